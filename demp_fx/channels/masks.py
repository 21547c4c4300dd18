"""Masks of attention: whether one may leave nothing of a row, so that its shares sum to zero."""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from demp_fx.channels.computed import computed

ATTENTION: set[Any] = {
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}


def may_mask_all(
    node: fx.Node,
    graph: fx.GraphModule,
    given: Set[fx.Node],
    real: Callable[[], AbstractContextManager[None]],
) -> bool:
    """Whether attention in `node` may have a row of which a mask leaves nothing.

    A mask that depends on the input (is `given`) may; a constant one is looked at, computed with
    the `real` parameters and buffers.
    """
    further = [a for a in (*node.args[3:], *node.kwargs.values()) if isinstance(a, fx.Node)]
    if not further:
        return False
    if node.target not in ATTENTION or any(n in given for n in further):
        return True
    with real():
        return not all(_leaves_some(computed(n, graph, {})) for n in further)


def _leaves_some(mask: Any) -> bool:
    """Whether a mask (boolean, or added to the scores) leaves something of each row."""
    if not isinstance(mask, Tensor) or mask.is_meta:
        return not isinstance(mask, Tensor)
    left = mask if mask.dtype == torch.bool else mask != -torch.inf
    return bool(left.any(-1).all())
