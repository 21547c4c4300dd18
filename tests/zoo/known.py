"""Which channels of a tensor hold one and the same number in every run, and which number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAME = 1e-9  # two values this close are one constant; exact zeros are compared exactly


class Known:
    """Collected over runs, in eval and train mode apart."""

    def __init__(self) -> None:
        self.steady: Tensor | None = None
        self.first: dict[bool, Tensor] = {}  # by mode

    def see(self, channels: Tensor, train: bool) -> Tensor:
        """Add a run's values, (channels, positions); which channels vary in this run."""
        low, high = channels.amin(dim=1), channels.amax(dim=1)
        near = SAME * high.abs().clamp(min=1)
        first = self.first.setdefault(train, low)
        varies = high - low > near
        steady = ~varies & ((low - first).abs() <= near)
        self.steady = steady if self.steady is None else self.steady & steady
        return varies

    @property
    def known(self) -> Tensor:
        """(channels,): one number in all runs of a mode."""
        assert self.steady is not None
        return self.steady

    @property
    def zero(self) -> Tensor:
        """(channels,): known, and zero."""
        return self.known & (self._numbers() == 0).all(dim=0)

    def carriers(self, padded: bool, channels: slice) -> int:
        """How many of these channels must stand for the constants that do not fold into a bias."""
        constants = self._numbers()[:, channels][:, self.known[channels]]
        if not constants.numel():
            return 0
        if padded:
            return int(torch.linalg.matrix_rank(constants))
        return int(bool(((constants[0] - constants[-1]).abs() > SAME).any()))

    def _numbers(self) -> Tensor:
        return torch.stack(list(self.first.values()))


def channels_first(x: Tensor, axis: int) -> Tensor:
    """(channels, everything else)."""
    x = x.movedim(axis, 0)
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))
