"""What a read can do without, and constants that go into its weights: a bias, or a few carriers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.runs import Indices, Mask
from demp_fx.channels.system import Read, System


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


def by_bias(read: Read, facts: Facts) -> Tensor:
    """Which constants the bias behind a read can take: flat ones, the same in both modes."""
    if read.fold is None or read.fold.bias is None or read.fold.padded:
        return torch.zeros_like(facts.known)
    return facts.constant & facts.steady


@dataclass(frozen=True)
class Carried:
    """The constants of a read that only channels that stay can stand for.

    `atoms` (n), by the numbers of their classes, like the `outputs` of the read; their `values` in
    eval and in train mode (2, n). `profiles`: which of them have the same spatial profile, and of
    what rank those are.
    """

    atoms: Indices
    outputs: list[Indices]
    values: npt.NDArray[np.float64]
    profiles: list[tuple[Indices, int]]
    answers: dict[bytes, int | None] = field(default_factory=dict)

    def missing(self, kept: Mask) -> int | None:
        """What must stay so that the dropped constants are a combination of kept ones."""
        key = kept.tobytes()  # the same is asked again while others find something missing
        if key not in self.answers:
            self.answers[key] = self._missing(kept)
        return self.answers[key]

    def _missing(self, kept: Mask) -> int | None:
        """Of each spatial profile at most two independent constants are needed."""
        for here, rank in self.profiles:
            stay = here[kept[here]]
            basis = independent(self.values[:, stay]) if stay.size < here.size else rank
            if basis == rank:
                continue
            gone = here[~kept[here]]
            for index in gone[np.argsort(-np.abs(self.values[:, gone]).sum(0), kind="stable")]:
                more = np.sort(np.append(stay, index))
                if independent(self.values[:, more]) > basis:
                    return int(self.atoms[index])
        return None


def carried(system: System, folds: dict[int, Facts], number: Indices) -> list[Carried]:
    """Each read's constants that no bias can take; `number`: the class of each atom."""
    found = []
    for read in system.reads:
        facts = folds.get(id(read))
        if facts is None or not bool((rest := facts.constant).any()):
            continue
        rest &= ~by_bias(read, facts)
        if read.silent is not None:
            rest &= ~read.silent
        if bool(rest.any()):
            atoms, values = number[read.inputs[rest].numpy()], facts.values[:, rest].numpy()
            outputs = [number[o.numpy()] for o in read.outputs]
            profile = facts.profile[rest].numpy()
            alike = [np.flatnonzero(profile == one) for one in np.unique(profile)]
            ranks = [(here, independent(values[:, here])) for here in alike]
            found.append(Carried(atoms, outputs, values, ranks))
    return found


def independent(values: npt.NDArray[np.float64]) -> int:
    """The rank of a (2, n) matrix, up to rounding: whether any column leaves the line of the
    longest one."""
    lengths = np.square(values).sum(0)
    if not lengths.any():
        return int(bool(values.any()))
    longest = int(lengths.argmax())
    x, y = values[:, longest]
    apart = np.abs(x * values[1] - y * values[0]).max()
    return 1 + int(apart > 1e-9 * lengths[longest])
