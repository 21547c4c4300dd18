"""What is known of one tensor during a walk, and of one ATen op as it was called."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels
from demp_fx.channels.system import Site


@dataclass(slots=True)
class Value:
    """What the walk knows of one tensor.

    `data`: for a parameter, buffer or a view of one, the real tensor behind it. `vector`: its facts
    are its numbers, read when they are asked for; `matrix`: they are the rows that are all zero.
    `shares`: it sums to one along its last dim. `table`: it is computed from parameters and
    buffers alone. `never_negative`: no element ever is; `never_positive`: those that never are, a
    mask that broadcasts.
    """

    labels: Labels = ()
    known: Facts | None = None
    data: Tensor | None = None
    version: int = 0
    vector: bool = False
    matrix: bool = False
    shares: bool = False
    table: bool = False
    never_negative: bool = False
    never_positive: Tensor | None = None

    @property
    def facts(self) -> Facts | None:
        if self.vector and self.known is None and self.data is not None:
            self.known = Facts.exactly(self.data)
        if self.matrix and self.known is None and self.data is not None:
            self.matrix, self.known = False, Facts.of_rows(self.data)
        return self.known


@dataclass(slots=True)
class Call:
    """One ATen op as it was called, and what it returned."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    site: Site

    def arg(self, name: str) -> Any:
        """An argument by its name in the op's schema, or its default; None where it has none."""
        position, default = _arguments(self.op).get(name, (len(self.args), None))
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        found = []
        for a in (*self.args, *self.kwargs.values()):
            if isinstance(a, Tensor):
                found.append(a)
            elif isinstance(a, (list, tuple)):
                found.extend(t for t in a if isinstance(t, Tensor))
        return found

    @property
    def outputs(self) -> list[Tensor]:
        if isinstance(self.out, Tensor):
            return [self.out]
        return [t for t in pytree.tree_leaves(self.out) if isinstance(t, Tensor)]


@functools.cache
def _arguments(op: torch._ops.OpOverload) -> dict[str, tuple[int, Any]]:
    return {a.name: (k, a.default_value) for k, a in enumerate(op._schema.arguments)}
