"""Classes of atoms: those that are tied live and die together, and count as one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from demp_fx.channels.constraints import Axis
from demp_fx.channels.runs import Indices
from demp_fx.channels.system import System


def components(size: int, ties: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """For each of `size` atoms the smallest atom it is tied to, however indirectly."""
    pairs = list(ties)
    root = torch.arange(size)
    a = torch.cat([p[0] for p in pairs]) if pairs else root[:0]
    b = torch.cat([p[1] for p in pairs]) if pairs else a
    apart = (a != b).nonzero().reshape(-1)
    a, b = a[apart], b[apart]
    tied = torch.zeros(size, dtype=torch.bool)
    tied[a] = tied[b] = True
    atoms = tied.nonzero().reshape(-1)
    while True:
        x, y = root[a], root[b]
        apart = (x != y).nonzero().reshape(-1)
        if not apart.numel():
            return root
        a, b, x, y = a[apart], b[apart], x[apart], y[apart]
        root.scatter_reduce_(0, torch.maximum(x, y), torch.minimum(x, y), "amin")
        here = root[atoms]
        higher = root[here]
        while not torch.equal(here, higher):
            root[atoms] = here = higher
            higher = root[here]


def classes(system: System) -> Tensor:
    """For each atom the smallest one that it is tied to, all cuts open."""
    if system.root is None:
        root = torch.arange(system.atoms)
        for axis, first in _joined_axes(system):
            root[axis.start : axis.stop] = root[first : first + axis.size]
        a, b = system.ties
        system.root = components(system.atoms, [(root[a], root[b])])[root] if a.numel() else root
    return system.root


def _joined_axes(system: System) -> list[tuple[Axis, int]]:
    """Axes that are tied as a whole to others, each with the first of the smallest atoms."""
    to: dict[int, int] = {}

    def smallest(k: int) -> int:
        while k in to:
            k = to[k]
        return k

    for pair in system.whole:
        low, high = sorted(map(smallest, pair))
        if low != high:
            to[high] = low
    return [(axis, smallest(axis.start)) for axis in system.axes if axis.start in to]


def numbered(root: Indices) -> tuple[Indices, int]:
    """For each atom the number of its class, by the smallest atom in it, and how many there are."""
    firsts = np.flatnonzero(root == np.arange(root.size))
    table = np.empty_like(root)
    table[firsts] = np.arange(firsts.size)
    return table[root], firsts.size
