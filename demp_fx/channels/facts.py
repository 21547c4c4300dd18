"""What is known of a value, channel by channel: zero, a constant, or nothing.

Both modes are followed at once, because batch norm maps a constant to its running-statistics image
in eval mode and to its bias in train mode.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demp_fx.channels.labels import beside

EVAL, TRAIN = 0, 1
_ZERO = torch.zeros((), dtype=torch.float64)
_NOWHERE = torch.zeros((), dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about one tensor of rank r, each of a shape that broadcasts to it (1 where uniform).

    `known` (bool): the element is one constant whatever the input. `values` (float64, with a
    leading dim of two): that constant in eval and in train mode. `profile` (int): 0, or the number
    of a spatial map that multiplies the constant, left behind by zero padding.
    """

    known: Tensor
    values: Tensor
    profile: Tensor

    @classmethod
    def of(cls, known: Tensor, values: Tensor, profile: int = 0) -> Facts | None:
        """Facts from arrays, or None where nothing is known. Unknown entries are stored as 0; a
        number that is not finite is not known."""
        numbers = values.numpy()  # small, and numpy's calls take half as long there
        finite = np.isfinite(numbers)
        told = np.asarray(known.numpy() & finite[EVAL] & finite[TRAIN])
        if not told.any():
            return None
        known, values = torch.from_numpy(told), torch.from_numpy(np.where(told, numbers, 0.0))
        if profile == 0:
            return cls(known, values, _NOWHERE.expand(known.shape))
        return cls(known, values, torch.where(known & (values != 0).any(0), profile, 0))

    @classmethod
    def exactly(cls, numbers: Tensor) -> Facts:
        """The facts of a tensor whose numbers are known; of complex ones, which are zero."""
        if numbers.is_complex():
            return cls.zeros(numbers.cpu() == 0)
        numbers = numbers.to("cpu", torch.float64)
        known = torch.ones_like(numbers, dtype=torch.bool)
        values = numbers.expand(2, *numbers.shape)
        return cls(known, values, torch.zeros_like(known, dtype=torch.int64))

    @classmethod
    def zeros(cls, known: Tensor) -> Facts:
        """Zero where it is `known`."""
        return cls(known, _ZERO.expand(2, *known.shape), _NOWHERE.expand(known.shape))

    @property
    def zero(self) -> Tensor:
        blank = self.values.numpy() == 0
        return torch.from_numpy(np.asarray(self.known.numpy() & blank[EVAL] & blank[TRAIN]))

    @property
    def constant(self) -> Tensor:
        """Known, and not zero."""
        return self.known & (self.values != 0).any(0)

    @property
    def flat(self) -> Tensor:
        """Known, and the same at every place."""
        return self.known & (self.profile == 0)

    @property
    def steady(self) -> Tensor:
        """Flat, and the same in both modes."""
        return self.flat & (self.values[EVAL] == self.values[TRAIN])

    def map(self, move: Callable[[Tensor], Tensor]) -> Facts:
        """The facts of a value whose elements `move` only moves."""
        values = torch.stack([move(self.values[EVAL]), move(self.values[TRAIN])])
        return Facts(move(self.known), values, move(self.profile))

    def aligned(self, rank: int) -> Facts:
        """With leading dims of size 1, for broadcasting to `rank`."""
        lead = (1,) * (rank - self.known.dim())
        return self._reshaped(lead + self.known.shape) if lead else self

    def spread(self, rank: int, dim: int) -> Facts:
        """Facts along one axis (1-D) as those of a tensor of `rank`, on `dim`."""
        shape = [1] * rank
        shape[dim] = -1
        return self._reshaped(tuple(shape))

    def _reshaped(self, shape: tuple[int, ...]) -> Facts:
        values = self.values.reshape(2, *shape)
        return Facts(self.known.reshape(shape), values, self.profile.reshape(shape))

    def along(self, dim: int, size: int) -> Facts | None:
        """Facts of the whole slices along `dim` (1-D): known where all their elements agree. Of
        slices without elements nothing is known."""
        if self.known.numel() == 1:
            return self.map(lambda t: t.reshape(1).expand(size))
        if self.known.numel() == self.known.size(dim):
            return self._reshaped((-1,))
        if not self.known.numel():
            return None
        known, profile = (t.movedim(dim, 0).flatten(1) for t in (self.known, self.profile))
        values = self.values.movedim(dim + 1, 1).flatten(2)
        agree = (values == values[..., :1]).all(-1).all(0) & (profile == profile[:, :1]).all(-1)
        known = known.all(-1) & agree
        return Facts(known, values[..., 0], profile[:, 0]).map(lambda t: t.expand(size))

    def uniform(self, dims: Collection[int]) -> Facts | None:
        """What is the same all along `dims`."""
        known, values, profile = self.known, self.values, self.profile
        for d in dims:
            one, alike = known.narrow(d, 0, 1), values == values.narrow(d + 1, 0, 1)
            alike = alike.all(0) & known & (profile == profile.narrow(d, 0, 1))
            known = one & alike.all(d, keepdim=True)
            values, profile = values.narrow(d + 1, 0, 1), profile.narrow(d, 0, 1)
        return Facts(known, values, profile) if bool(known.any()) else None

    def under(self, proven: Facts | None) -> Facts:
        """These facts where nothing is `proven`."""
        if proven is None:
            return self
        known = proven.known | self.known
        values = torch.where(proven.known, proven.values, self.values)
        return Facts(known, values, torch.where(proven.known, proven.profile, self.profile))

    def same_as(self, other: Facts) -> bool:
        """Whether both say the same."""
        return (
            torch.equal(self.known, other.known)
            and torch.equal(self.values, other.values)
            and torch.equal(self.profile, other.profile)
        )


def same_place(facts: list[Facts]) -> list[Facts]:
    """The facts of several operands, broadcast against each other."""
    if len(facts) == 1:
        return facts
    rank = max(f.known.dim() for f in facts)
    facts = [f.aligned(rank) for f in facts]
    shape = torch.broadcast_shapes(*(f.known.shape for f in facts))
    return [f.map(lambda t: t.expand(shape)) for f in facts]


def agreed(one: Facts, other: Facts) -> Facts | None:
    """What both say, of numbers that are the same everywhere."""
    one, other = same_place([one, other])
    return Facts.of(one.flat & other.flat & (one.values == other.values).all(0), one.values)


def unknown(rank: int) -> Facts:
    """Facts of a tensor of which nothing is known."""
    blank = torch.zeros((1,) * rank)
    return Facts(blank.bool(), torch.zeros((2,) + (1,) * rank).double(), blank.long())


def joined(
    found: Sequence[Facts | None], sizes: Sequence[int], rank: int, dim: int
) -> Facts | None:
    """The facts of tensors in a row, of these `sizes` along `dim`."""
    if all(f is None for f in found):
        return None
    filled = [unknown(rank) if f is None else f.aligned(rank) for f in found]
    known, evaluated, trained, profile = (
        beside(parts, sizes, dim)
        for parts in zip(*((f.known, *f.values, f.profile) for f in filled), strict=True)
    )
    return Facts(known, torch.stack([evaluated, trained]), profile)


def in_each_mode(evaluated: Facts | None, trained: Facts | None) -> Facts | None:
    """What is known of a value that is one thing in eval mode and another in train mode."""
    if evaluated is None or trained is None or evaluated.known.shape != trained.known.shape:
        return None
    values = torch.stack([evaluated.values[EVAL], trained.values[TRAIN]])
    return Facts.of(evaluated.flat & trained.flat, values)
