"""One cycle: the schedule of the penalty's and the noise's strength."""

from __future__ import annotations

import math
from dataclasses import dataclass

RISE = 0.3  # the share of the span that goes up
START = 25.0  # peak / start
END = 25e4  # peak / end


@dataclass(frozen=True)
class OneCycle:
    """Cosine from peak/25 up to `peak` at 30 % of `span` steps, down to peak/25e4 at `span`, and
    constant from there on. Called with a step, counted from 0."""

    peak: float
    span: int

    def __call__(self, step: int) -> float:
        top = int(RISE * self.span)
        if step < top:
            return _cosine(self.peak / START, self.peak, step / top)
        if step < self.span:
            return _cosine(self.peak, self.peak / END, (step - top) / (self.span - top))
        return self.peak / END


def _cosine(start: float, end: float, share: float) -> float:
    """Half a cosine wave from `start` (share 0) to `end` (share 1)."""
    return start + (end - start) * (1.0 - math.cos(math.pi * share)) / 2.0
