"""What a read can do without, and constants that go into its weights: a bias, or a few carriers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from demp_fx.channels.facts import Facts
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


@dataclass(frozen=True, slots=True)
class Carried:
    """The constants of a read that only channels that stay can stand for: `atoms` (n), with their
    `values` (2, n) in eval and in train mode, and their `profile` (n)."""

    read: Read
    atoms: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    profile: npt.NDArray[np.int64]

    def missing(self, kept: npt.NDArray[np.bool_]) -> int | None:
        """An atom that must stay so that the dropped constants are a combination of kept ones.

        Of each spatial profile at most two independent ones are needed.
        """
        for profile in np.unique(self.profile[~kept]):
            here = self.profile == profile
            stay, gone = here & kept, np.flatnonzero(here & ~kept)
            basis = independent(self.values[:, stay])
            if basis == independent(self.values[:, here]):
                continue
            for index in gone[np.argsort(-np.abs(self.values[:, gone]).sum(0), kind="stable")]:
                stay[index] = True
                if independent(self.values[:, stay]) > basis:
                    return int(self.atoms[index])
                stay[index] = False
        return None


def carried(system: System, folds: dict[int, Facts]) -> list[Carried]:
    """Each read's constants that no bias can take."""
    found = []
    for read in system.reads:
        facts = folds.get(id(read))
        if facts is None:
            continue
        rest = facts.constant & ~by_bias(read, facts)
        if read.silent is not None:
            rest &= ~read.silent
        if bool(rest.any()):
            parts = (read.inputs[rest], facts.values[:, rest], facts.profile[rest])
            found.append(Carried(read, *(part.numpy() for part in parts)))
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
