"""What may go: the least set of atoms to keep, as one monotone fixpoint.

Start with nothing kept but the pins; while something changes, a read with a surviving output keeps
the inputs that are not dead at it, and an edge keeps what its other side needs. Forward death,
backward death, residuals and concats are the same few lines. Blocks are completed at the end: what
nobody needs fills them up.
"""

from __future__ import annotations

import functools
from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demp_fx.channels.blocks import fillers
from demp_fx.channels.classes import classes, components, numbered
from demp_fx.channels.constants import carried, dead_at, foldable
from demp_fx.channels.constraints import Edge, Link, Pin, Product, Read
from demp_fx.channels.runs import Indices, Mask, Runs
from demp_fx.channels.solution import Draft, Solution
from demp_fx.channels.system import System


def droppable(edge: Edge) -> Tensor | None:
    """Which channels an edge need not carry, because they can be supplied behind it: zeros, and
    constants that are the same everywhere and in both modes."""
    return None if edge.kind == "gather" or edge.facts is None else edge.facts.steady


@dataclass(slots=True)
class _Step:
    """A read, edge, link or product: any survivor in each of `outputs` keeps `needs`; if it goes in
    `pairs`, one keeps the need at the same place."""

    outputs: list[Indices]
    needs: Indices
    pairs: bool


class Solver:
    """A system, made ready to be solved several times with other edges closed.

    `number`: the class of each atom, all cuts open; in all that follows, classes stand for atoms.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.folds = foldable(system)
        self.number, self.classes = numbered(classes(system).numpy())
        pins = (pin for pin in system.pins if pin.outputs)
        flow = [*system.flow, *system.links, *system.products, *pins]
        steps = [(id(step), *self._needs(step)) for step in reversed(flow)]
        self.steps = [step for step in steps if step[2].numel()]
        self.inside = self._runs([a for _, outs, needs, _ in self.steps for a in (*outs, needs)])
        self.edges = system.edges
        self.open = np.array([e.kind != "gather" for e in self.edges], dtype=np.bool_)
        self.gathered = np.repeat(~self.open, [e.source.numel() for e in self.edges])
        self.sources = self._runs([e.source for e in self.edges])
        self.targets = self._runs([e.target for e in self.edges])
        elsewhere = np.ones(system.atoms, dtype=np.bool_)
        for edge in self.edges:
            elsewhere[edge.target.numpy()] = edge.kind == "gather"
        self.made = np.zeros(self.classes, dtype=np.bool_)
        self.made[self.number[elsewhere]] = True
        tied = {b for a, b in system.whole if a < b}  # to one before them
        self.axes = [axis for axis in system.axes if axis.start not in tied]
        self.along = self._runs([axis.atoms for axis in self.axes])
        self.pinned = self._runs([pin.atoms for pin in system.pins if not pin.outputs]).at
        self.carried = carried(system, self.folds, self.number)
        links = ((link.rows.numpy(), link.gate.numpy()) for link in system.links)
        self.links = [(self.number[rows], self.number[gate]) for rows, gate in links]
        products = ((p.cells, *p.sides) for p in system.products)
        self.products = [[self.number[t.numpy()] for t in product] for product in products]
        self.multiples = [(self.number[m.atoms.numpy()], m.of) for m in system.multiples]
        blocks = (self.number[block.atoms.numpy()] for block in system.blocks)
        # the same ones are met by every op on their way
        self.blocks = list({(b.shape, b.tobytes()): b for b in blocks}.values())

    @functools.cached_property
    def readers(self) -> list[tuple[list[Indices], Indices, Indices | None]]:
        """The outputs, inputs and gate of all that computes with several channels at once."""
        number = self.number
        found: list[tuple[list[Indices], Indices, Indices | None]] = []
        for read in self.system.reads:
            gate = None if read.gate is None else number[read.gate.numpy()]
            outputs = [number[o.numpy()] for o in read.outputs]
            found.append((outputs, number[read.inputs.numpy()], gate))
        for pin in self.system.pins:
            if pin.spared is not None:
                outputs = [number[o.numpy()] for o in pin.outputs]
                found.append((outputs, number[pin.spared.numpy()], None))
        return found

    def solve(self, hard: Set[int] = frozenset()) -> Solution:
        """The least fixpoint, those edges closed whose ids are `hard`."""
        merged = np.arange(self.classes)
        closed = [k for k, edge in enumerate(self.edges) if id(edge) in hard]
        if closed:
            sides = ((self.sources.part(k), self.targets.part(k)) for k in closed)
            ties = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in sides]
            merged = components(self.classes, ties).numpy()
        keep = np.zeros(self.classes, dtype=np.bool_)
        keep[0] = True
        keep[merged[self.pinned]] = True
        fill, idle = np.zeros_like(keep), np.zeros_like(keep)
        draft = Draft(merged, keep, fill, self._supplied(merged, closed), idle)
        steps = self._steps(merged, hard)
        while True:
            _propagate(steps, keep)
            completing = (self._multiply, self._revive, self._complete, self._carry, self._rely)
            if not any(step(draft) for step in completing):
                present = draft.present()
                mask = torch.from_numpy(present[self.number])
                return Solution(mask, draft.revived, present, merged)

    def _runs(self, parts: list[Tensor]) -> Runs:
        return Runs(parts, self.number)

    def _needs(self, step: Read | Edge | Link | Product | Pin) -> tuple[list[Tensor], Tensor, bool]:
        if isinstance(step, Pin):
            return list(step.outputs), step.atoms, False
        if isinstance(step, Link):
            gates = step.gate.unsqueeze(1).expand(step.rows.shape).reshape(-1)
            return [step.rows.reshape(-1)], gates, True
        if isinstance(step, Product):
            return [step.cells.repeat(len(step.sides))], torch.cat(step.sides), True
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

    def _steps(self, merged: Indices, hard: Set[int]) -> list[_Step]:
        """The steps, in reverse order of execution, with what closed edges tie made one."""
        parts = iter(self.inside.split(merged[self.inside.at] if hard else self.inside.at))
        found = []
        for number, outputs, _, pairs in self.steps:
            step = _Step([next(parts) for _ in outputs], next(parts), pairs)
            if number not in hard:
                found.append(step)
        return found

    def _supplied(self, merged: Indices, closed: list[int]) -> Mask:
        """Classes whose channels nothing computes but edges that can supply zeros and constants."""
        made = self.made.copy()
        for k in closed:
            made[self.targets.part(k)] = True
        if closed:
            made[merged[made]] = True
        return ~made

    def _revive(self, draft: Draft) -> bool:
        """Keep one channel of every axis: torch refuses layers of width zero. It has to cross all
        gathers, and where nothing needs to cross another edge, one channel behind it does."""
        kept, found = draft.present(), False
        if self.edges:
            before, after = kept[self.sources.at], kept[self.targets.at]
            for k in self.sources.at[after & ~before & self.gathered].tolist():
                found |= draft.revive(draft.merged[k])
            crossed, behind = (
                np.logical_or.reduceat(side, self.targets.ends[:-1])
                for side in (before & after, after)
            )
            for k in np.flatnonzero(self.open & behind & ~crossed).tolist():
                source = self.sources.part(k)
                wanted = draft.kept(self.targets.part(k))
                if not (wanted & draft.kept(source)).any():
                    found |= draft.revive(draft.merged[source[wanted][0]])
            if found:
                kept = draft.present()
        alive = np.logical_or.reduceat(kept[self.along.at], self.along.ends[:-1])
        dead = np.flatnonzero(~alive).tolist()
        there = np.zeros(self.classes if dead else 0, dtype=np.bool_)  # before a gather, anyway
        if dead and self.edges:
            there[draft.merged[self.targets.at[before & self.gathered]]] = True
        for k in dead:
            found, channels = True, draft.merged[self.along.part(k)]
            if draft.revive(channels[there[channels].argmax()]):
                draft.revived.append(self.axes[k])
        return found

    def _rely(self, draft: Draft) -> bool:
        """What was kept for its axis has to hold what it always held, where that is computed with:
        it was zero, say, and could have gone."""
        if not draft.idle.any():
            return False
        relied = []
        for outputs, inputs, gate in self.readers:
            here = draft.idle[draft.merged[inputs]]
            if not here.any() or not all(draft.keep[draft.merged[o]].any() for o in outputs):
                continue
            if gate is not None:
                here &= draft.keep[draft.merged[gate]]
            relied.append(draft.merged[inputs[here]])
        before, behind = draft.merged[self.sources.at], draft.merged[self.targets.at]
        relied.append(before[draft.idle[before] & draft.keep[behind]])
        needed = np.concatenate(relied)
        draft.keep[needed] = True
        draft.idle[needed] = False
        return bool(needed.size)

    def _multiply(self, draft: Draft) -> bool:
        """Keep the cells all of whose sides stay."""
        found = False
        for cells, *sides in self.products:
            wanted = draft.merged[cells[np.logical_and.reduce([draft.kept(s) for s in sides])]]
            found |= not draft.keep[wanted].all()
            draft.keep[wanted] = True
        return found

    def _complete(self, draft: Draft) -> bool:
        """Make blocks equal and axes as long as kernels take them, and let the rows of a link
        survive with their gate."""
        found = False
        for rows, gate in self.links:
            alive, kept = draft.kept(rows).any(1), draft.kept(gate)
            found |= draft.add(gate[alive & ~kept])
            found |= draft.add(rows[kept & ~alive][:, 0])
        for block in self.blocks:
            found |= draft.add(block[fillers(draft.kept(block))])
        for atoms, of in self.multiples:
            there = draft.kept(atoms)
            found |= draft.add(atoms[~there][: -int(there.sum()) % of])
        return found

    def _carry(self, draft: Draft) -> bool:
        """Keep the carriers: constants that no bias can take are folded into a few that stay."""
        found = False
        for constants in self.carried:
            if all(draft.kept(o).any() for o in constants.outputs):
                wanted = constants.missing(draft.kept(constants.atoms))
                if wanted is not None:
                    draft.keep[draft.merged[wanted]] = found = True
        return found


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
            elif not all(np.count_nonzero(keep[o]) for o in step.outputs):
                later.append(step)
                continue
            missing = needs[~keep[needs]]
            if missing.size:
                keep[missing] = True
                changed = True
        waiting = later
