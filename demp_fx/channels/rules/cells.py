"""Weights that one axis held, outputs and inputs in one (those of several experts, a row each)."""

from __future__ import annotations

from torch import Tensor

from demp_fx.channels.labels import Labels, along, varying
from demp_fx.channels.rules.operand import Operand
from demp_fx.channels.stream import Stream
from demp_fx.channels.system import Product
from demp_fx.channels.value import Call


def told_apart(walk: Stream, call: Call, weight: Operand, *letters: str) -> None:
    """Give a weight labels of their own for its outputs and inputs (these letters) where it has one
    over both: a cell survives iff both of its sides do."""
    dims = tuple(sorted(map(weight.dim, letters)))
    labels = walk.value(weight.tensor).labels
    if any(varying(label) == dims for label in labels):
        found = tuple(x for label in labels for x in _sides(walk, call, label, dims))
        walk.relabel(weight.tensor, found)


def _sides(walk: Stream, call: Call, label: Tensor, dims: tuple[int, ...]) -> Labels:
    if varying(label) != dims:
        return (label,)
    cells = label.reshape([label.size(d) for d in dims])
    first, second = (walk.system.fresh(call.site.node, -1, n).atoms for n in cells.shape)
    sides = (first.repeat_interleave(cells.size(1)), second.repeat(cells.size(0)))
    walk.system.products.append(Product(cells.reshape(-1), *sides, call.site))
    return tuple(along(x, label.dim(), d) for x, d in zip((first, second), dims, strict=True))
