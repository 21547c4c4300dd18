"""Where cutting the graph pays: a gather before a reader, an `index_add` after a narrow branch.

Memory traffic is not free. A cut is weighed in numbers moved: what the gather itself moves, against
what the removed channels would have moved and multiplied behind (or before) it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from demp_fx.channels.solve import Solution, solve
from demp_fx.channels.system import Edge, System

Cuts = Literal["pays", "always", "never"]

# Multiplications in the time of moving one number: about ten on a CPU core and over a hundred with
# tensor cores; low values cut less.
MACS_PER_NUMBER = 32
# A weight is read forward and backward, and its gradient is written.
MOVES_PER_WEIGHT = 3


def decide(system: System, cuts: Cuts = "pays") -> Solution:
    """Solve, and close every cut that does not pay ("never": all, "always": none)."""
    edges = system.edges
    hard = {id(e) for e in edges} if cuts == "never" else set()
    solution = solve(system, hard)
    while cuts == "pays":
        places: dict[tuple[str, str], list[Edge]] = defaultdict(list)
        for edge in cut_edges(solution, edges):
            alone = "" if edge.kind == "gather" else edge.producer
            places[edge.consumer, alone].append(edge)
        if not places:
            break
        cost = _Costs(system, solution)
        closed = {
            id(e) for place in places.values() if sum(map(cost.gain, place)) <= 0 for e in place
        }
        if not closed:
            break
        hard |= closed
        solution = solve(system, hard)
    return solution


def cut_edges(solution: Solution, edges: list[Edge]) -> list[Edge]:
    """The edges on whose two sides channels differ."""
    if not edges:
        return []
    differ = solution.kept(torch.cat([e.source for e in edges])) != solution.kept(
        torch.cat([e.target for e in edges])
    )
    ends = torch.tensor([e.source.numel() for e in edges]).cumsum(0)
    found = torch.searchsorted(ends, differ.nonzero().reshape(-1), right=True).unique()
    return [edges[k] for k in found.tolist()]


class _Costs:
    """What one channel of each atom class moves and multiplies."""

    def __init__(self, system: System, solution: Solution) -> None:
        root, size = solution.root, system.atoms
        moved = [(t.atoms, 2.0 * t.elements) for t in system.traffic]
        worked: list[tuple[Tensor, float]] = []
        for read in system.reads:
            work = read.macs / MACS_PER_NUMBER + read.weights * MOVES_PER_WEIGHT
            worked += [(s, work / max(1, s.numel())) for s in (read.inputs, *read.outputs)]
        self.solution = solution
        self.price = _weigh(root, size, moved + worked)

    def gain(self, edge: Edge) -> float:
        """Numbers saved by cutting here, less the numbers that the cut moves."""
        before, after = self.solution.kept(edge.source), self.solution.kept(edge.target)
        root, kept = self.solution.root, int(after.sum())
        saved = self.price[root[edge.source[after & ~before]]].sum()
        saved += self.price[root[edge.target[before & ~after]]].sum()
        both = int((before & after).sum())
        moved = 2.0 * both if bool((before & ~after).any()) else 0.0
        if edge.kind == "sum":  # read and write the sum, read and write where it is added to
            moved += max(3.0 * both - kept, 0.0)
        elif both < kept:  # write everything, then read and write what is there
            moved += kept + 2.0 * both
        return float(saved) - moved * edge.elements


def _weigh(root: Tensor, size: int, items: Iterable[tuple[Tensor, float]]) -> Tensor:
    pairs = list(items)
    price = torch.zeros(size, dtype=torch.float64)
    if pairs:
        atoms = root[torch.cat([a for a, _ in pairs])]
        each = torch.tensor([v for _, v in pairs], dtype=torch.float64)
        counts = torch.tensor([a.numel() for a, _ in pairs])
        price.index_add_(0, atoms, each.repeat_interleave(counts))
    return price
