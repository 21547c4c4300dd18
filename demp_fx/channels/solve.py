"""What may go: the least set of atoms to keep, as one monotone fixpoint.

Start with nothing kept but the pins; while something changes, a read with a surviving output keeps
the inputs that are not dead at it, and an edge keeps what its other side needs. Forward death,
backward death, residuals and concats are the same few lines. Blocks are completed at the end: what
nobody needs fills them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from demp_fx.channels.blocks import fillers
from demp_fx.channels.constants import carried, dead_at, foldable
from demp_fx.channels.system import Axis, Edge, Link, Pin, Read, System


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


@dataclass
class Solution:
    """Which atoms stay.

    `keep` and `fill` (bool, one an atom) are meant to be read through `kept`: what is needed, and
    what only fills a block, with zeros or constants that an edge supplies. `supplied`: the atoms
    that can be such. `revived`: axes of which every channel could have gone, and that keep one.
    """

    system: System
    root: Tensor
    keep: Tensor
    fill: Tensor
    supplied: Tensor
    revived: list[Axis] = field(default_factory=list)
    final: Tensor | None = None

    def kept(self, atoms: Tensor) -> Tensor:
        """A mask over `atoms`: True where they stay."""
        if self.final is not None:
            return self.final[atoms]
        roots = self.root[atoms]
        return self.keep[roots] | self.fill[roots]

    def add(self, atoms: Tensor) -> None:
        """Keep atoms that nobody needs: as zeros where an edge supplies them, else as they are."""
        roots = self.root[atoms]
        free = self.supplied[roots]
        self.fill[roots[free]] = True
        self.keep[roots[~free]] = True

    def settled(self) -> Solution:
        """This solution, no longer to be changed, and faster to ask."""
        self.final = (self.keep | self.fill)[self.root]
        return self


Indices = npt.NDArray[np.int64]  # numpy indexes small arrays several times faster than torch
Mask = npt.NDArray[np.bool_]


def droppable(edge: Edge) -> Tensor | None:
    """Which channels an edge need not carry, because they can be supplied behind it: zeros, and
    constants that are the same everywhere and in both modes."""
    return None if edge.kind == "gather" or edge.facts is None else edge.facts.steady


@dataclass(slots=True)
class _Step:
    """A read, edge or link: any survivor in each of `outputs` keeps `needs`; if it goes in `pairs`,
    one keeps the need at the same place."""

    outputs: list[Indices]
    needs: Indices
    pairs: bool


class Solver:
    """A system, made ready to be solved several times with other edges closed."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.folds = foldable(system)
        flow = [*system.flow, *system.links, *(p for p in system.pins if p.outputs)]
        steps = [(id(step), *self._needs(step)) for step in reversed(flow)]
        self.steps = [step for step in steps if step[2].numel()]
        self.atoms = _joined([a for _, outputs, needs, _ in self.steps for a in (*outputs, needs)])
        self.open = [e for e in system.edges if e.kind != "gather"]
        self.sides = [_joined(side) for side in
                      ([e.source for e in self.open], [e.target for e in self.open])]  # fmt: skip
        ends = np.cumsum([0, *(e.source.numel() for e in self.open)])
        self.starts = ends[:-1]
        axes = [(axis.start - 1, axis.stop - 1) for axis in system.axes]
        self.axes = np.array(axes, dtype=np.int64).reshape(-1, 2)
        self.carried = carried(system, self.folds)
        blocks = {(b.atoms.shape, b.atoms.numpy().tobytes()): b.atoms for b in system.blocks}
        self.blocks = list(blocks.values())  # the same ones are met by every op on their way

    def solve(self, hard: Set[int] = frozenset()) -> Solution:
        """The least fixpoint, those edges closed whose ids are `hard`."""
        system, root = self.system, classes(self.system)
        if hard:
            closed = [(root[e.source], root[e.target]) for e in system.edges if id(e) in hard]
            root = components(system.atoms, closed)[root]
        keep = torch.zeros(system.atoms, dtype=torch.bool)
        keep[0] = True
        for pin in system.pins:
            if not pin.outputs:
                keep[root[pin.atoms]] = True
        fill, supplied = torch.zeros_like(keep), self._supplied(root, hard)
        solution = Solution(system, root, keep, fill, supplied)
        steps, mask = self._steps(root.numpy(), hard), keep.numpy()
        while True:
            _propagate(steps, mask)
            if not (self._revive(solution) or self._complete(solution) or self._carry(solution)):
                return solution.settled()

    def _needs(self, step: Read | Edge | Link | Pin) -> tuple[list[Tensor], Tensor, bool]:
        if isinstance(step, Pin):
            return list(step.outputs), step.atoms, False
        if isinstance(step, Link):
            gates = step.gate.unsqueeze(1).expand(step.rows.shape).reshape(-1)
            return [step.rows.reshape(-1)], gates, True
        if isinstance(step, Read):
            dead = dead_at(step, self.folds)
            needs = step.inputs if dead is None else step.inputs[~dead]
            if step.gate is not None:
                return [step.gate if dead is None else step.gate[~dead]], needs, True
            return list(step.outputs), needs, False
        free = droppable(step)
        if free is None:
            return [step.target], step.source, True
        return [step.target[~free]], step.source[~free], True

    def _steps(self, root: Indices, hard: Set[int]) -> list[_Step]:
        """The steps on classes instead of atoms, in reverse order of execution."""
        there, at, found = root[self.atoms], 0, []
        for number, outputs, needs, pairs in self.steps:
            parts = []
            for atoms in (*outputs, needs):
                parts.append(there[at : at + atoms.numel()])
                at += atoms.numel()
            if number not in hard:
                found.append(_Step(parts[:-1], parts[-1], pairs))
        return found

    def _supplied(self, root: Tensor, hard: Set[int]) -> Tensor:
        """Classes whose channels nothing computes but edges that can supply zeros and constants."""
        made = torch.ones(self.system.atoms, dtype=torch.bool)
        if self.system.blocks or self.system.links:
            for edge in self.open:
                if id(edge) not in hard:
                    made[edge.target] = False
            made[root[made.nonzero().reshape(-1)]] = True
        return ~made

    def _revive(self, solution: Solution) -> bool:
        """Keep one channel of every axis: torch refuses layers of width zero. Where nothing
        needs to cross an edge, one of the channels behind it does."""
        kept, found = (solution.keep | solution.fill)[solution.root].numpy(), False
        if self.open:
            before, after = (kept[side] for side in self.sides)
            crossed = np.logical_or.reduceat(before & after, self.starts)
            for k in (~crossed & np.logical_or.reduceat(after, self.starts)).nonzero()[0].tolist():
                edge = self.open[k]
                behind = solution.kept(edge.target)
                if not bool((behind & solution.kept(edge.source)).any()):
                    solution.keep[solution.root[edge.source[behind][0]]] = found = True
            if found:
                kept = (solution.keep | solution.fill)[solution.root].numpy()
        count = kept.cumsum()
        for k in (count[self.axes[:, 1]] == count[self.axes[:, 0]]).nonzero()[0].tolist():
            atom, found = solution.root[self.system.axes[k].start], True
            if not bool(solution.keep[atom]):
                solution.keep[atom] = True
                solution.revived.append(self.system.axes[k])
        return found

    def _complete(self, solution: Solution) -> bool:
        """Make blocks equal, and let the rows of a link survive with their gate."""
        if not (solution.system.blocks or solution.system.links):
            return False
        before = int(solution.keep.sum()) + int(solution.fill.sum())
        for link in solution.system.links:
            rows, gate = solution.kept(link.rows).any(1), solution.kept(link.gate)
            solution.add(link.gate[rows & ~gate])
            solution.add(link.rows[gate & ~rows][:, 0])
        for atoms in self.blocks:
            solution.add(atoms[fillers(solution.kept(atoms))])
        return int(solution.keep.sum()) + int(solution.fill.sum()) > before

    def _carry(self, solution: Solution) -> bool:
        """Keep the carriers: constants that no bias can take are folded into a few that stay."""
        found, root = False, solution.root.numpy()
        keep, fill = solution.keep.numpy(), solution.fill.numpy()
        for constants in self.carried:
            if all(bool(solution.kept(o).any()) for o in constants.read.outputs):
                roots = root[constants.atoms]
                wanted = constants.missing(keep[roots] | fill[roots])
                if wanted is not None:
                    keep[root[wanted]] = found = True
        return found


def _joined(parts: list[Tensor]) -> Indices:
    joined: Indices = torch.cat(parts or [torch.zeros(0, dtype=torch.int64)]).numpy()
    return joined


def _propagate(steps: list[_Step], keep: Mask) -> None:
    """Run every step until nothing changes. Steps are in reverse order of execution, so that need
    flows backward through the whole network in one sweep."""
    waiting, changed = steps, True
    while changed:
        changed, later = False, []
        for step in waiting:
            needs = step.needs
            if step.pairs:
                needs = needs[keep[step.outputs[0]]]
                if needs.size < step.needs.size:
                    later.append(step)
            elif not all(keep[o].any() for o in step.outputs):
                later.append(step)
                continue
            if not keep[needs].all():
                keep[needs] = True
                changed = True
        waiting = later
