"""The watch node: behind an activation, it tells which neurons are dead on the probe batches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Test = Literal["one-sided", "silent", "two-sided"]


class Watch(nn.Module):
    """Identity on an activation; counts deaths of the channels on `dim` while it is `recording`.

    One-sided: a channel is dead in a batch if the sum of its activations over batch and space is at
    most `threshold` (for a ReLU and a threshold of 0: it never fired). Silent: if none of them is
    above `threshold`; for activations that may be negative that asks for more. Two-sided, for those
    that saturate at -1 and 1: if all are within `threshold` of one of the two. Dead is what is so
    in every batch, and, two-sided, always on the same side.
    """

    def __init__(self, dim: int, test: Test = "one-sided", threshold: float = 0.0) -> None:
        super().__init__()
        self.dim, self.test, self.threshold = dim, test, threshold
        self.recording = False
        self.dead: Tensor | None = None
        self.level: Tensor | None = None
        self.held: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.recording:
            self._record(x.detach())
        if self.held is not None:
            dead, level = (t.reshape([-1] + [1] * (x.dim() - self.dim % x.dim() - 1))
                           for t in self.held)  # fmt: skip
            return torch.where(dead, level.to(x.dtype), x)
        return x

    def start(self) -> None:
        """Begin a death test: nothing is seen yet."""
        self.recording, self.dead, self.level = True, None, None

    def stop(self) -> tuple[Tensor, Tensor]:
        """End it: which channels are dead (bool), and at which level they stand (0, -1 or 1).

        Without any batch nothing is known to be dead, and it raises `RuntimeError`.
        """
        self.recording = False
        dead, level = self.dead, self.level
        self.dead = self.level = None
        if dead is None or level is None:
            raise RuntimeError("the death test saw no batch")
        return dead, level

    def _record(self, x: Tensor) -> None:
        rest = [d for d in range(x.dim()) if d != self.dim % x.dim()]
        if self.test == "one-sided":
            wide = torch.promote_types(x.dtype, torch.float32)
            dead = x.sum(rest, dtype=wide) <= self.threshold
            level = torch.zeros_like(dead, dtype=torch.float32)
        elif self.test == "silent":
            dead = x.amax(rest) <= self.threshold
            level = torch.zeros_like(dead, dtype=torch.float32)
        else:
            top = x.amin(rest) >= 1 - self.threshold
            bottom = x.amax(rest) <= self.threshold - 1
            dead, level = top | bottom, top.float() - bottom.float()
        if self.dead is not None and self.level is not None:
            dead = dead & self.dead & (level == self.level)
        self.dead, self.level = dead, level

    def extra_repr(self) -> str:
        return f"dim={self.dim}, test={self.test}, threshold={self.threshold}"
