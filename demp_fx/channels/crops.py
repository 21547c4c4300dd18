"""Crops at a size of the input, `table[:, : x.shape[1]]`: another input reads other entries."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from demp_fx.calls import called

aten = torch.ops.aten
_NARROWS = {"narrow", torch.narrow, aten.narrow.default, aten.slice.Tensor}


def cropped_dims(node: fx.Node, rank: int, varies: Callable[[fx.Node], bool]) -> set[int]:
    """The dims that `node` crops at a size, or picks at one, which depends on the inputs, as
    `varies` tells; `rank`: of the tensor it crops."""
    if called(node) in _NARROWS and any(
        isinstance(a, fx.Node) and varies(a) for a in node.args[2:]
    ):
        dim: Any = node.args[1]
        return {dim % rank}
    if node.target is not operator.getitem:
        return set()
    index: Any = node.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    taken = sum(1 for e in entries if e is not None and e is not Ellipsis)
    dims, dim = set(), 0
    for entry in entries:
        if entry is None:
            continue
        if entry is Ellipsis:
            dim += rank - taken
            continue
        bounds = (entry.start, entry.stop) if isinstance(entry, slice) else (entry,)
        if any(isinstance(bound, fx.Node) and varies(bound) for bound in bounds):
            dims.add(dim)
        dim += 1
    return dims
