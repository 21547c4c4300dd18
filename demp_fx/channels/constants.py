"""What a read can do without, and constants that go into its weights: a bias, or a few carriers."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from demp_fx.channels.constraints import Fold, Read
from demp_fx.channels.facts import Facts
from demp_fx.channels.runs import Indices, Mask
from demp_fx.channels.system import System


def foldable(system: System) -> dict[int, Facts]:
    """For each read (by its id) that may fold constants into its weights: the facts it may use.

    What is folded for one read of a weight changes all others (of a layer that is called twice,
    say): only constants that all of them agree on are, and none where they read it differently.
    Where something else uses a weight (an embedding that is tied to it), only its bias may change.
    """
    alike: dict[Fold, list[Read]] = defaultdict(list)
    for read in system.reads:
        if read.fold is not None:
            alike[read.fold].append(read)
    weights = Counter(fold.weight for fold in alike)
    biases = Counter(fold.bias for fold in alike)
    found: dict[int, Facts] = {}
    for fold, reads in alike.items():
        if weights[fold.weight] == 1 and (fold.bias is None or biases[fold.bias] == 1):
            facts = _usable(system, fold, reads)
            found |= {id(read): facts for read in reads if facts is not None}
    return found


def _usable(system: System, fold: Fold, reads: list[Read]) -> Facts | None:
    """What all reads of a weight agree on and can fold."""
    facts = [read.facts for read in reads if read.facts is not None]
    sites = {read.site for read in reads}
    if len(facts) < len(reads) or (fold.bias is not None and system.uses_of(fold.bias) - sites):
        return None
    first, known = facts[0], facts[0].known
    for other in facts[1:]:
        same = (first.values == other.values).all(0) & (first.profile == other.profile)
        known = known & other.known & same
    if system.uses_of(fold.weight) - sites:
        known = known & (first.zero | by_bias(reads[0], first))
    return Facts(known, first.values, first.profile) if bool(known.any()) else None


def dead_at(read: Read, folds: dict[int, Facts]) -> Tensor | None:
    """Which inputs a read can do without: zeros, weights of zero, constants that it can fold."""
    dead = read.silent
    if read.facts is not None:
        known, facts = read.facts.zero, folds.get(id(read))
        known = known if facts is None else known | facts.known
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
