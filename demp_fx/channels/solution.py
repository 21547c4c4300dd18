"""Which atoms stay: decided, and while it is being decided."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from demp_fx.channels.constraints import Axis
from demp_fx.channels.runs import Indices, Mask


@dataclass(frozen=True)
class Solution:
    """Which atoms stay.

    `mask` (one an atom) is meant to be read through `kept`. `revived`: axes of which every channel
    could have gone, and that keep one. `present`: the same as `mask`, one for each class of atoms
    that are tied with all cuts open; `merged`: for each of these the one that it is tied to through
    closed ones.
    """

    mask: Tensor
    revived: list[Axis]
    present: Mask
    merged: Indices

    def kept(self, atoms: Tensor) -> Tensor:
        """A mask over `atoms`: True where they stay."""
        return self.mask[atoms]


@dataclass
class Draft:
    """A solution on its way, by classes.

    What stays is `keep` and `fill`: what is needed, and what only fills a block, with zeros or
    constants that an edge supplies, or an axis that nobody reads. `supplied`: the classes that can
    be the first; `idle`: those that are the second.
    """

    merged: Indices
    keep: Mask
    fill: Mask
    supplied: Mask
    idle: Mask
    revived: list[Axis] = field(default_factory=list)

    def kept(self, classes: Indices) -> Mask:
        at = self.merged[classes]
        kept: Mask = self.keep[at] | self.fill[at]
        return kept

    def present(self) -> Mask:
        present: Mask = (self.keep | self.fill)[self.merged]
        return present

    def revive(self, one: int) -> bool:
        """Keep a class that nobody reads, whatever it holds; whether that is new."""
        new = not (self.keep[one] or self.fill[one])
        self.fill[one] = self.idle[one] = True
        return new

    def add(self, classes: Indices) -> bool:
        """Keep what nobody needs: as zeros where an edge supplies it, else as it is; whether that
        is new."""
        at = self.merged[classes]
        free = self.supplied[at]
        filled, needed = at[free], at[~free]
        new = not (self.fill[filled].all() and self.keep[needed].all())
        self.fill[filled] = True
        self.keep[needed] = True
        return new
