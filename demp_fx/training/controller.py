"""The controller: finds the penalty that brings a network to a given size in the span.

At every death check it looks at what would be left without the dead, and compares that with a
reference that falls from the dense network to the target. The penalty is multiplied up where too
few have died, and down where too many have. Once the target is reached, or the span is over, there
is none any more: what is left of the run is for the network to recover.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from demp_fx.recipe import Measure

BEGIN, END = 0.1, 0.6  # of the span: where the reference begins to fall, and arrives
GAIN = 6.0  # how fast the penalty follows an error, in units of e per check
LIMIT = 0.7  # no more than this factor (e ** LIMIT) from one check to the next
# Never above the first penalty by more than CEILING: scales that every step throws from one side of
# zero to the other do not rest near it, so that fewer die and the network is torn apart.
CEILING = 5.0
# Never below the largest penalty so far by more than FLOOR: to be ahead costs little, as no more is
# cut than the target allows, and what dies late dies at a low learning rate, if at all.
FLOOR = 3.0
NEAR = 0.05  # relative: what counts as having reached the target


@dataclass
class Controller:
    """Steers towards `share` of `measure` in `span` steps, from a first `penalty` on."""

    measure: Measure
    share: float
    span: int
    penalty: float
    last: float = 1.0
    top: float = 0.0
    reached: bool = False

    def __post_init__(self) -> None:
        self.ceiling = CEILING * self.penalty

    def reference(self, step: int) -> float:
        """The share that ought to be left at a step."""
        ramp = (step / self.span - BEGIN) / (END - BEGIN)
        return 1 - (1 - self.share) * min(1.0, max(0.0, ramp))

    def observe(self, step: int, left: float, steps: int) -> None:
        """Told of a check: the share that is `left` without the dead, `steps` after the last."""
        if left <= self.share * (1 + NEAR / 5):
            self.reached, self.penalty = True, 0.0
        elif step >= self.span:
            self.penalty = 0.0
        elif not self.reached:
            ahead = self.reference(step + steps)  # the check that this penalty leads to
            coming = left - (self.last - left)  # if as many die until then
            error = (coming - ahead) / min(ahead, 1 - self.share)
            factor = math.exp(max(-LIMIT, min(LIMIT, GAIN * error)))
            self.top = max(self.top, self.penalty)
            self.penalty = min(max(self.penalty * factor, self.top / FLOOR), self.ceiling)
        self.last = left

    def verdict(self, left: float) -> str:
        """How it ended, in words."""
        aim = f"{self.measure} at {self.share:.1%} of the dense network"
        if abs(left / self.share - 1) <= NEAR:
            return f"{aim}: reached, {left:.2%}"
        return f"{aim}: not reached in {self.span} steps, {left:.2%} are left"

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        names = ("penalty", "last", "top", "reached")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        for name, value in state.items():
            setattr(self, name, value)
