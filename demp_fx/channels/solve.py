"""What may go: the least set of atoms to keep, as one monotone fixpoint.

Start with nothing kept but the pins; while something changes, a read with a surviving output keeps
the inputs that are not dead at it, and an edge keeps what its other side needs. Forward death,
backward death, residuals and concats are the same few lines. Blocks are completed at the end: what
nobody needs fills them up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from demp_fx.channels.blocks import fillers
from demp_fx.channels.facts import Facts
from demp_fx.channels.system import Axis, Edge, Link, Pin, Read, System


def components(size: int, ties: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """For each of `size` atoms the smallest atom it is tied to, however indirectly."""
    pairs = list(ties)
    root = torch.arange(size)
    a = torch.cat([p[0] for p in pairs]) if pairs else root[:0]
    b = torch.cat([p[1] for p in pairs]) if pairs else a
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
        system.root = components(system.atoms, [system.ties])
    return system.root


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


@dataclass(slots=True)
class _Step:
    """A read, edge or link, prepared: any survivor in each of `outputs` keeps `needs`; if it goes
    in `pairs`, one keeps the need at the same place."""

    outputs: list[Indices]
    needs: Indices
    pairs: bool


def foldable(system: System) -> dict[int, Facts]:
    """For each read (by its id) that may fold constants into its weights: the facts it may use.

    A weight that is read twice folds nothing: what one read needs would change the other.
    """
    used = Counter(r.fold.weight for r in system.reads if r.fold is not None)
    biases = Counter(r.fold.bias for r in system.reads if r.fold is not None)
    return {
        id(r): r.facts
        for r in system.reads
        if r.fold is not None and r.facts is not None
        and used[r.fold.weight] == 1 and (r.fold.bias is None or biases[r.fold.bias] == 1)
    }  # fmt: skip


def dead_at(read: Read, folds: dict[int, Facts]) -> Tensor | None:
    """Which inputs a read can do without: zeros, weights of zero, constants that it can fold."""
    dead = read.silent
    if read.facts is not None:
        known = read.facts.known if id(read) in folds else read.facts.zero
        dead = known if dead is None else dead | known
    return dead


def droppable(edge: Edge) -> Tensor | None:
    """Which channels an edge need not carry, because they can be supplied behind it: zeros, and
    constants that are the same everywhere and in both modes."""
    return None if edge.kind == "gather" or edge.facts is None else edge.facts.steady


def solve(system: System, hard: Set[int] = frozenset()) -> Solution:
    """The least fixpoint; `hard`: ids of edges that are not to be cut."""
    root = classes(system)
    if hard:
        closed = [(root[e.source], root[e.target]) for e in system.edges if id(e) in hard]
        root = components(system.atoms, closed)[root]
    keep = torch.zeros(system.atoms, dtype=torch.bool)
    keep[0] = True
    for pin in system.pins:
        if not pin.outputs:
            keep[root[pin.atoms]] = True
    folds, roots, mask = foldable(system), root.numpy(), keep.numpy()
    flow = [*system.flow, *system.links, *(p for p in system.pins if p.outputs)]
    steps = [_prepare(step, roots, folds) for step in flow if id(step) not in hard]
    steps.reverse()
    solution = Solution(system, root, keep, torch.zeros_like(keep), _supplied(system, root, hard))
    while True:
        _propagate(steps, mask)
        if not (_revive(solution) or _complete(solution) or _carry(solution, folds)):
            return solution.settled()


def _supplied(system: System, root: Tensor, hard: Set[int]) -> Tensor:
    """Classes whose channels nothing computes but edges that can supply zeros and constants."""
    made = torch.ones(system.atoms, dtype=torch.bool)
    if system.blocks or system.links:
        for edge in system.edges:
            if edge.kind != "gather" and id(edge) not in hard:
                made[edge.target] = False
        made[root[made.nonzero().reshape(-1)]] = True
    return ~made


def _prepare(step: Read | Edge | Link | Pin, root: Indices, folds: dict[int, Facts]) -> _Step:
    if isinstance(step, Pin):
        return _Step([root[o.numpy()] for o in step.outputs], root[step.atoms.numpy()], False)
    if isinstance(step, Link):
        gates = step.gate.unsqueeze(1).expand(step.rows.shape).reshape(-1)
        return _Step([root[step.rows.reshape(-1).numpy()]], root[gates.numpy()], True)
    if isinstance(step, Read):
        dead = dead_at(step, folds)
        needs = step.inputs if dead is None else step.inputs[~dead]
        if step.gate is not None:
            gates = step.gate if dead is None else step.gate[~dead]
            return _Step([root[gates.numpy()]], root[needs.numpy()], True)
        return _Step([root[o.numpy()] for o in step.outputs], root[needs.numpy()], False)
    free = droppable(step)
    source, target = step.source, step.target
    if free is not None:
        source, target = source[~free], target[~free]
    return _Step([root[target.numpy()]], root[source.numpy()], True)


def _propagate(steps: list[_Step], keep: npt.NDArray[np.bool_]) -> None:
    """Run every step until nothing changes. Steps are in reverse order of execution, so that need
    flows backward through the whole network in one sweep."""
    waiting, changed = [step for step in steps if step.needs.size], True
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


def _complete(solution: Solution) -> bool:
    """Make blocks equal, and let the rows of a link survive with their gate."""
    if not (solution.system.blocks or solution.system.links):
        return False
    before = int(solution.keep.sum()) + int(solution.fill.sum())
    for link in solution.system.links:
        rows, gate = solution.kept(link.rows).any(1), solution.kept(link.gate)
        solution.add(link.gate[rows & ~gate])
        solution.add(link.rows[gate & ~rows][:, 0])
    for blocks in solution.system.blocks:
        solution.add(blocks.atoms[fillers(solution.kept(blocks.atoms))])
    return int(solution.keep.sum()) + int(solution.fill.sum()) > before


def _revive(solution: Solution) -> bool:
    """Keep one channel of every axis: torch refuses layers of width zero. Where nothing
    needs to cross an edge, one of the channels behind it does."""
    found = False
    for edge in solution.system.edges:
        after = solution.kept(edge.target) if edge.kind != "gather" else None
        if after is None or bool((after & solution.kept(edge.source)).any()):
            continue
        if bool(after.any()):
            solution.keep[solution.root[edge.source[after][0]]] = found = True
    axes = solution.system.axes
    count = (solution.keep | solution.fill)[solution.root].to(torch.int64).cumsum(0)
    ends = torch.tensor([(axis.start - 1, axis.stop - 1) for axis in axes]).reshape(-1, 2)
    empty = (count[ends[:, 1]] == count[ends[:, 0]]).nonzero().reshape(-1).tolist()
    for k in empty:
        atom = solution.root[axes[k].start]
        if not bool(solution.keep[atom]):
            solution.keep[atom] = True
            solution.revived.append(axes[k])
    return found or bool(empty)


def _carry(solution: Solution, folds: dict[int, Facts]) -> bool:
    """Keep the carriers: constants that no bias can take are folded into a few that stay."""
    found = False
    for read in solution.system.reads:
        facts = folds.get(id(read))
        if facts is None or not all(bool(solution.kept(o).any()) for o in read.outputs):
            continue
        wanted = missing_carrier(read, facts, solution.kept(read.inputs))
        if wanted is not None:
            solution.keep[solution.root[read.inputs[wanted]]] = True
            found = True
    return found


def by_bias(read: Read, facts: Facts) -> Tensor:
    """Which constants the bias behind a read can take: flat ones, the same in both modes."""
    if read.fold is None or read.fold.bias is None or read.fold.padded:
        return torch.zeros_like(facts.known)
    return facts.constant & facts.steady


def missing_carrier(read: Read, facts: Facts, kept: Tensor) -> int | None:
    """A channel that must stay so that the dropped constants are a combination of kept ones.

    A constant is a pair (its value in eval, in train mode): of each spatial profile at most two
    independent ones are needed.
    """
    rest = facts.constant & ~by_bias(read, facts)
    if read.silent is not None:
        rest &= ~read.silent
    for profile in facts.profile[rest & ~kept].unique().tolist():
        here = rest & (facts.profile == profile)
        basis = independent(facts.values[:, here & kept])
        if basis == independent(facts.values[:, here]):
            continue
        size = torch.where(here & ~kept, facts.values.abs().sum(0), -1.0)
        for index in size.argsort(descending=True).tolist():
            chosen = here & kept
            chosen[index] = True
            if independent(facts.values[:, chosen]) > basis:
                return int(index)
    return None


def independent(values: Tensor) -> int:
    """The rank of a (2, n) matrix, up to rounding."""
    if values.numel() == 0:
        return 0
    steady = values[0] == values[1]
    if bool(steady.all()):
        return int(bool((values != 0).any()))
    return int(torch.linalg.matrix_rank(values, rtol=1e-9))
