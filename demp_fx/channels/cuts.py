"""Where cutting the graph pays: a gather before a reader, an `index_add` after a narrow branch.

Memory traffic is not free. A cut is weighed in numbers moved: what the gather itself moves, against
what the removed channels would have moved and multiplied behind (or before) it.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from demp_fx.channels.constraints import Edge
from demp_fx.channels.runs import Indices, Mask, Runs
from demp_fx.channels.solution import Solution
from demp_fx.channels.solve import Solver
from demp_fx.channels.system import System
from demp_fx.errors import UsageError

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
    if cuts not in get_args(Cuts):
        raise UsageError(f"cuts: one of {', '.join(get_args(Cuts))}, not {cuts!r}")
    hard = {id(e) for e in system.edges} if cuts == "never" else set()
    solver = Solver(system)
    solution, costs = solver.solve(hard), _Costs(solver)
    cost = None
    while cuts == "pays":
        bad = costs.bad_places(solution)
        if not bad:
            break
        cost = costs.total(solution) if cost is None else cost
        for places in (bad, bad[: len(bad) // 2]):
            if sum(moved for _, moved in places) <= cost * SLACK:
                continue  # little more than what they move could be saved
            closed = hard | {id(e) for place, _ in places for e in place}
            without = solver.solve(closed)
            cheaper = costs.total(without)
            if cheaper <= cost * (1 - SLACK):
                hard, solution, cost = closed, without, cheaper
                break
        else:
            break
    return solution


Numbers = npt.NDArray[np.float64]


class _Costs:
    """What solutions of one system move and multiply, in numbers moved."""

    def __init__(self, solver: Solver) -> None:
        self.solver, self.edges = solver, solver.edges
        self.sums = np.array([e.kind == "sum" for e in self.edges], dtype=np.bool_)
        self.elements = np.array([e.elements for e in self.edges], dtype=np.float64)

    @functools.cached_property
    def _traffic(self) -> tuple[Runs, Numbers]:
        """The values that are written, and what one channel of each moves."""
        written = self.solver.system.traffic
        moved = np.array([2.0 * t.elements for t in written])
        return Runs([t.atoms for t in written], self.solver.number), moved

    @functools.cached_property
    def _work(self) -> tuple[Runs, Numbers, Indices]:
        """The inputs and outputs of every read; of each the read's work in all; where reads start
        among them."""
        parts: list[Tensor] = []
        work: list[float] = []
        starts: list[int] = []
        for read in self.solver.system.reads:
            sides = (read.inputs, *read.outputs)
            starts.append(len(parts))
            parts += sides
            price = read.macs / MACS_PER_NUMBER + read.weights * MOVES_PER_WEIGHT
            work += [price] * len(sides)
        runs = Runs(parts, self.solver.number)
        return runs, np.array(work), np.array(starts, dtype=np.int64)

    @functools.cached_property
    def _price(self) -> Numbers:
        """What one channel of each class moves and multiplies, all cuts open."""
        (written, moved), (worked, work, _) = self._traffic, self._work
        sizes, lengths = np.diff(written.ends), np.diff(worked.ends)
        each = [moved.repeat(sizes), (work / np.maximum(lengths, 1)).repeat(lengths)]
        at = np.concatenate([written.at, worked.at])
        price = np.bincount(at, np.concatenate(each), self.solver.classes)
        return price.astype(np.float64, copy=False)

    def bad_places(self, solution: Solution) -> list[tuple[list[Edge], float]]:
        """The places whose cuts move more than they free next to them, the worst first, and how
        many numbers they move."""
        moves, cut = self._moves(solution)
        if not cut.any():
            return []
        gains = self._freed(solution) - moves
        places: dict[tuple[str, str], list[Edge]] = defaultdict(list)
        gain: dict[tuple[str, str], float] = defaultdict(float)
        moved: dict[tuple[str, str], float] = defaultdict(float)
        for k in np.flatnonzero(cut).tolist():
            edge = self.edges[k]
            place = edge.consumer, "" if edge.kind == "gather" else edge.producer
            places[place].append(edge)
            gain[place] += float(gains[k])
            moved[place] += float(moves[k])
        worst = sorted(places, key=gain.__getitem__)
        return [(places[place], moved[place]) for place in worst if gain[place] <= 0]

    def total(self, solution: Solution) -> float:
        """What the narrow network moves and multiplies in all."""
        (written, moved), (worked, work, starts) = self._traffic, self._work
        kept, each = worked.counts(solution.present), np.maximum(np.diff(worked.ends), 1)
        parts = np.multiply.reduceat(kept / each, starts) @ work[starts]
        moves, _ = self._moves(solution)
        return float(moved @ written.counts(solution.present) + parts + moves.sum())

    def _sides(self, solution: Solution) -> tuple[Mask, Mask]:
        """What stays before all cuts, and behind them."""
        solver, present = self.solver, solution.present
        return present[solver.sources.at], present[solver.targets.at]

    def _moves(self, solution: Solution) -> tuple[Numbers, Mask]:
        """How many numbers each cut moves; which edges are one, as channels differ on their two
        sides."""
        left, right = self._sides(solution)
        before, after, both = map(self.solver.targets.within, (left, right, left & right))
        cut = (before > both) | (after > both)
        gathered = np.where(before > both, 2.0 * both, 0.0)
        # a sum: read and write it, read and write where it is added to
        added = np.maximum(3.0 * both - after, 0.0)
        # zeros and constants: write everything, then read and write what is there
        spread = np.where(after > both, after + 2.0 * both, 0.0)
        moves = gathered + np.where(self.sums, added, spread)
        return np.where(cut, moves * self.elements, 0.0), cut

    def _freed(self, solution: Solution) -> Numbers:
        """The numbers saved next to each cut."""
        merged, solver = solution.merged, self.solver
        price = np.bincount(merged, self._price, merged.size)[merged]
        left, right = self._sides(solution)
        saved = np.where(right & ~left, price[solver.sources.at], 0.0)
        saved += np.where(left & ~right, price[solver.targets.at], 0.0)
        freed: Numbers = np.add.reduceat(saved, solver.targets.ends[:-1])
        return freed
