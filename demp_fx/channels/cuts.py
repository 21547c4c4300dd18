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

from demp_fx.channels.solve import Solution, Solver
from demp_fx.channels.system import Edge, System

Cuts = Literal["pays", "always", "never"]

# Multiplications in the time of moving one number: about ten on a CPU core and over a hundred with
# tensor cores; low values cut less. Everything is counted for a training step, in units of one
# forward pass over the activations, which backward doubles; a product costs it three times.
MACS_PER_NUMBER = 32 / 1.5
# A weight is read forward and backward, its gradient written and read; the optimizer reads and
# writes it and two moments: ten moves in all.
MOVES_PER_WEIGHT = 10 / 2
SLACK = 0.02  # closing cuts has to save so much of all; below that, narrower is better


def decide(system: System, cuts: Cuts = "pays") -> Solution:
    """Solve, and close every cut that does not pay ("never": all, "always": none).

    A cut is first weighed by what it frees next to it. If the network as a whole gets dearer
    without those that look bad, only the worse half of them is closed, if that saves something.
    """
    hard = {id(e) for e in system.edges} if cuts == "never" else set()
    solver = Solver(system)
    solution = solver.solve(hard)
    cost = None
    while cuts == "pays":
        bad = _bad_places(system, solution)
        if not bad:
            break
        cost = total(system, solution) if cost is None else cost
        for places in (bad, bad[: len(bad) // 2]):
            closed = hard | {id(e) for place in places for e in place}
            without = solver.solve(closed)
            cheaper = total(system, without)
            if cheaper <= cost * (1 - SLACK):
                hard, solution, cost = closed, without, cheaper
                break
        else:
            break
    return solution


def _bad_places(system: System, solution: Solution) -> list[list[Edge]]:
    """The places whose cuts move more than they free next to them, the worst first."""
    places: dict[tuple[str, str], list[Edge]] = defaultdict(list)
    for edge in cut_edges(solution, system.edges):
        alone = "" if edge.kind == "gather" else edge.producer
        places[edge.consumer, alone].append(edge)
    if not places:
        return []
    cost = _Costs(system, solution)
    gains = [(sum(map(cost.gain, place)), place) for place in places.values()]
    return [place for gain, place in sorted(gains, key=lambda pair: pair[0]) if gain <= 0]


def total(system: System, solution: Solution) -> float:
    """What the narrow network moves and multiplies in all, in numbers moved."""
    steps = [r for r in system.reads if r.macs or r.weights]
    runs = [t.atoms for t in system.traffic]
    for read in steps:
        runs += [read.inputs, *read.outputs]
    counts = iter(_counts(solution, runs))
    cost = sum(2.0 * t.elements * next(counts) for t in system.traffic)
    for read in steps:
        part = 1.0
        for atoms in (read.inputs, *read.outputs):
            part *= next(counts) / max(1, atoms.numel())
        cost += part * (read.macs / MACS_PER_NUMBER + read.weights * MOVES_PER_WEIGHT)
    for edge in cut_edges(solution, system.edges):
        cost += moves(solution, edge) * edge.elements
    return cost


def _counts(solution: Solution, runs: list[Tensor]) -> list[float]:
    """How many atoms of each run stay."""
    if not runs:
        return []
    kept = solution.kept(torch.cat(runs)).to(torch.int64).cumsum(0)
    ends = torch.tensor([r.numel() for r in runs]).cumsum(0)
    upto = torch.cat([torch.zeros(1, dtype=torch.int64), kept])[ends]
    found: list[float] = upto.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    return found


def moves(solution: Solution, edge: Edge) -> float:
    """How many numbers a cut moves, for each position."""
    before, after = solution.kept(edge.source), solution.kept(edge.target)
    kept, both = int(after.sum()), int((before & after).sum())
    moved = 2.0 * both if bool((before & ~after).any()) else 0.0
    if edge.kind == "sum":  # read and write the sum, read and write where it is added to
        moved += max(3.0 * both - kept, 0.0)
    elif both < kept:  # write everything, then read and write what is there
        moved += kept + 2.0 * both
    return moved


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
        root = self.solution.root
        saved = self.price[root[edge.source[after & ~before]]].sum()
        saved += self.price[root[edge.target[before & ~after]]].sum()
        return float(saved) - moves(self.solution, edge) * edge.elements


def _weigh(root: Tensor, size: int, items: Iterable[tuple[Tensor, float]]) -> Tensor:
    pairs = list(items)
    price = torch.zeros(size, dtype=torch.float64)
    if pairs:
        atoms = root[torch.cat([a for a, _ in pairs])]
        each = torch.tensor([v for _, v in pairs], dtype=torch.float64)
        counts = torch.tensor([a.numel() for a, _ in pairs])
        price.index_add_(0, atoms, each.repeat_interleave(counts))
    return price
