"""Axes that are merged into one, all of which can get narrower: what is in one *cell* of them
survives with each of its sides. So it is with the outputs and inputs of weights that one axis holds
(those of several experts, a row each), and with products of each channel of one value with each of
another."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.constraints import Product
from demp_fx.channels.labels import Labels, along, varying
from demp_fx.channels.rules.operand import Operand
from demp_fx.channels.stream import Stream
from demp_fx.channels.value import Call


def merged(walk: Stream, call: Call, labels: Labels) -> Labels:
    """The labels of a value, one for the cells of a dim where it had several. Those that stay
    anyway say nothing."""
    places = [varying(label) for label in labels]
    found: list[Tensor] = []
    for place in dict.fromkeys(places):
        here = [label for label, at in zip(labels, places, strict=True) if at == place]
        if len(here) > 1 and len(place) == 1:
            free = [label for label in here if not walk.system.is_fixed(label)]
            here = [_cells(walk, call, free)] if len(free) > 1 else free or here[:1]
        found += here
    return tuple(found)


def _cells(walk: Stream, call: Call, labels: list[Tensor]) -> Tensor:
    """Fresh atoms for each combination of theirs."""
    lines = [label.reshape(-1) for label in labels]
    number = torch.zeros_like(lines[0])
    for line in lines:  # (`unique(dim=1)` takes thirty times longer)
        _, number = (number * (line.max() + 1) + line).unique(return_inverse=True)
    cells = walk.system.fresh(f"{call.site.node}.cells", -1, int(number.max()) + 1).atoms
    sides = tuple(torch.empty_like(cells).scatter(0, number, line) for line in lines)
    walk.system.products.append(Product(cells, sides, call.site))
    walk.opens = True  # behind it, single cells may be left out
    return cells[number].reshape(labels[0].shape)


def told_apart(walk: Stream, call: Call, weight: Operand, inputs: str, outputs: set[str]) -> None:
    """Give a weight labels of their own for its inputs and outputs (letters) where it has one over
    both: a cell survives iff both of its sides do."""
    for letter in outputs:
        dims = tuple(sorted((weight.dim(inputs), weight.dim(letter))))
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
    walk.system.products.append(Product(cells.reshape(-1), sides, call.site))
    return tuple(along(x, label.dim(), d) for x, d in zip((first, second), dims, strict=True))
