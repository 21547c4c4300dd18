"""Tensors in nested values: lists, dicts, what pytree knows, and dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in what an op, a node or a network has given, in order."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for entry in dataclasses.fields(leaf):
                found += tensors_of(getattr(leaf, entry.name))
    return found
