"""What a user wants to stay: layers, by name, and widths that hardware likes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from demp_fx.channels.constraints import Axis, Site
from demp_fx.channels.solution import Solution
from demp_fx.channels.walk import Walk
from demp_fx.errors import UsageError


@dataclass(frozen=True)
class Asked:
    """What is to stay although it is dead.

    `keep`: layers or submodules that keep their shape, as name patterns. `round_to`: widths are
    rounded up to a multiple of this, or to the whole. Raises `UsageError` for what makes no sense.
    """

    keep: Sequence[str] = ()
    round_to: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            object.__setattr__(self, "keep", [self.keep])
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise UsageError(f"round_to: widths cannot be multiples of {self.round_to}")

    def pin_layers(self, walk: Walk) -> None:
        """Keep all channels of the layers that are named. Raises `UsageError` for a pattern that
        fits none."""
        names = {name: list(_prefixes(name)) for name in walk.params if self.keep}
        for pattern in self.keep:
            kept = {
                n for n, places in names.items() if any(fnmatchcase(p, pattern) for p in places)
            }
            if not kept:
                raise UsageError(f"keep: no layer with parameters fits {pattern!r}")
            pinned = [(axis.owner, axis.atoms) for axis in walk.system.axes]
            pinned += [(g.weight, g.second) for g in walk.system.groupings]
            for owner, atoms in pinned:
                if owner in kept:
                    reason = f"it is to be kept: {pattern}"
                    walk.system.pin(atoms, reason, Site("keep", owner))

    def pin_widths(self, walk: Walk, solution: Solution) -> bool:
        """Keep some of the dead where a width of a weight is no multiple; whether there are any.
        Widths that layers give come first: those that others take follow from them."""
        if self.round_to == 1:
            return False
        reason = f"widths are to be multiples of {self.round_to}"
        pinned = False
        for dim in (0, 1):
            for axis in _of_weights(walk, dim):
                kept = solution.kept(axis.atoms)
                missing = -int(kept.sum()) % self.round_to
                dead = axis.atoms[~kept][:missing]
                if dead.numel():
                    walk.system.pin(dead, reason, Site("round_to", axis.owner))
                    pinned = True
            if pinned:
                break
        return pinned


def _prefixes(name: str) -> Iterator[str]:
    """A parameter's name, and those of the modules that it is in."""
    return itertools.accumulate(name.split("."), lambda path, part: f"{path}.{part}")


def _of_weights(walk: Walk, dim: int) -> list[Axis]:
    """One axis of every weight that has several."""
    shapes = {
        name: value.data.dim() for name, value in walk.params.items() if value.data is not None
    }
    return [axis for axis in walk.system.axes if axis.dim == dim and shapes.get(axis.owner, 0) > 1]
