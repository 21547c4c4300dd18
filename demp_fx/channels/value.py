"""What is known of one tensor during a walk, and of one ATen op as it was called."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.constraints import Site
from demp_fx.channels.empty import Empty
from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, along
from demp_fx.trees import tensors_of


@dataclass(frozen=True, slots=True)
class Inside:
    """Facts that hold but for margins of `fill`, by dim: as long at either end at most."""

    facts: Facts
    fill: float
    margins: dict[int, int]


@dataclass(slots=True)
class Value:
    """What the walk knows of one tensor.

    `data`: for a parameter, buffer or a view of one, the real tensor behind it. `vector`: its facts
    are its numbers, read when they are asked for; `rows`: tells which of its rows, and of its
    columns, are all zero. `shares`: the dim along which it sums to one. `blank`: dims along which
    it holds the same, as often as the sizes want that it is given; `image_of`: what has such dims,
    too, and is what it is an image or a part of; `parts`: which dim of that each of its own comes
    from, and from which places on it; `lost`: those of that which it has not got. `table`: it is
    computed of parameters and buffers alone. `never_negative`: no element ever is, `positive`: all
    are above zero; `never_positive`: those that never are, a mask that broadcasts. `inside`: what
    was known of it before it was padded.
    """

    labels: Labels = ()
    known: Facts | None = None
    data: Tensor | None = None
    version: int = 0
    vector: bool = False
    rows: Empty | None = None
    shares: int | None = None
    blank: frozenset[int] = frozenset()
    image_of: Tensor | None = None
    parts: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    lost: frozenset[int] = frozenset()
    table: bool = False
    never_negative: bool = False
    positive: bool = False
    never_positive: Tensor | None = None
    inside: Inside | None = None

    @property
    def facts(self) -> Facts | None:
        if self.vector and self.known is None and self.data is not None:
            self.known = Facts.exactly(self.data)
        if self.rows is not None and self.known is None:
            rank = self.rows.weight.dim()
            found = ((d, self.rows.along(d)) for d in (0, 1))
            empty = [along(line, rank, d) for d, line in found if line is not None]
            self.rows = None
            self.known = Facts.zeros(functools.reduce(torch.logical_or, empty)) if empty else None
        return self.known


@dataclass(slots=True)
class Call:
    """One ATen op as it was called, and what it returned.

    `tensors`: every tensor among the arguments, in order. `outputs`: every one that it returned.
    """

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    site: Site
    tensors: list[Tensor] = field(init=False)
    outputs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = []
        for a in (*self.args, *self.kwargs.values()) if self.kwargs else self.args:
            if isinstance(a, Tensor):
                self.tensors.append(a)
            elif isinstance(a, (list, tuple)):
                self.tensors.extend(t for t in a if isinstance(t, Tensor))
        self.outputs = tensors_of(self.out)

    def arg(self, name: str) -> Any:
        """An argument by its name in the op's schema, or its default; None where it has none."""
        position, default = _arguments(self.op).get(name, (len(self.args), None))
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


@functools.cache
def _arguments(op: torch._ops.OpOverload) -> dict[str, tuple[int, Any]]:
    return {a.name: (k, a.default_value) for k, a in enumerate(op._schema.arguments)}
