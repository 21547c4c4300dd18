"""Whether the original's code decides by the sizes of its inputs, so that no graph follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from demp_fx.errors import VerificationError
from demp_fx.inputs import Inputs
from demp_fx.passes.calls import Precision, run
from demp_fx.passes.sides import Run
from demp_fx.passes.trials import resized, shortened
from demp_fx.trees import tensors_of


@dataclass(frozen=True)
class OtherSizes:
    """The original and the narrow module, and the graph that was `traced`, in eval mode at other
    sizes than those of the example `inputs`."""

    original: nn.Module
    narrow: nn.Module
    traced: nn.Module | None
    inputs: Inputs
    precision: Precision
    tolerance: float

    def decide(self) -> bool:
        """Whether images of another size, or sequences of another length, are found to go another
        way than the example."""
        images = self._decide(resized(self.inputs, odd=True), odd=True)
        if images is not False:
            images = self._decide(resized(self.inputs), odd=False) or images
        sequences = [self._decide(shorter, odd=True) for shorter in shortened(self.inputs)]
        return images is True or True in sequences

    def _decide(self, trial: Inputs | None, odd: bool) -> bool | None:
        """Whether neither the traced nor the narrow module follow the original on a `trial` of
        another size; None where it does not take that, or takes it for another number of samples
        (`x.view(-1, 512)` fits by chance, and mixes them). Raises `VerificationError` where the
        narrow one alone does not follow; but it may refuse `odd` sizes, at which some networks add
        up maps that only happen to fit."""
        if trial is None:
            return None
        try:
            given = Run(trial, False, self.precision, [self._run(trial)])
        except Exception:
            return None
        error, failure = given.error(self.narrow)
        if error <= self.tolerance or error <= given.amplified(self.original):
            return False
        if self.traced is not None and not given.error(self.traced)[0] <= self.tolerance:
            return True
        if odd and failure is not None:
            return True
        if _one_each(self._run(self.inputs), self.inputs) and not _one_each(given.outputs, trial):
            return None
        raise VerificationError(
            f"on inputs of shape {given.shapes} the narrow module differs from the original by "
            f"{error:.1e} ({failure or 'relative, float64'}); nothing was handed over"
        )

    def _run(self, inputs: Inputs) -> Any:
        return run(self.original, inputs, False, self.precision)


def _one_each(outputs: Any, inputs: Inputs) -> bool:
    """Whether all outputs hold as many samples as the inputs do."""
    batch = inputs.tensors[0].shape[:1]
    return all(t.shape[:1] == batch for t in tensors_of(outputs))
