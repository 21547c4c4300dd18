"""One call of the original, and how far other modules are from what it gave."""

from __future__ import annotations

import io
import math
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from demp_fx.errors import VerificationError
from demp_fx.inputs import Inputs
from demp_fx.passes.calls import Precision, runs
from demp_fx.trees import tensors_of

SHAKEN = 2.0**-50  # by how much inputs are moved to see what becomes of rounding: four units of it
AMPLIFIED = 8  # so often as far as the original moves then the narrow module may be away,
LOOSEST = 1e-5  # but no farther than that


@dataclass(frozen=True)
class Run:
    """What a module gave for `inputs` in one mode, call by call, and how it was computed."""

    inputs: Inputs
    training: bool
    precision: Precision
    outputs: list[Any]

    @property
    def first(self) -> Run:
        """The first of its calls."""
        return replace(self, outputs=self.outputs[:1])

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of the tensors among the inputs."""
        return [tuple(t.shape) for t in self.inputs.tensors]

    def is_defined(self) -> bool:
        """Whether all numbers that it gave are some."""
        return not any(bool(t.isnan().any()) for t in tensors_of(self.outputs))

    def error(self, module: nn.Module) -> tuple[float, Exception | None]:
        """How far a module's outputs are from these, and why it has none at all."""
        return self._error(module, self.inputs)

    def amplified(self, module: nn.Module) -> float:
        """What rounding may come to in the module that gave this: networks that divide by what is
        next to zero (by the spread of a single number, say) make much of the last digits."""
        if self.precision == "own":
            return 0.0
        shaken = self.inputs.map(
            lambda t: t.to(torch.float64) * (1 + SHAKEN) if t.is_floating_point() else t
        )
        moved, _ = self._error(module, shaken)
        return min(AMPLIFIED * moved, LOOSEST)

    def _error(self, module: nn.Module, inputs: Inputs) -> tuple[float, Exception | None]:
        try:
            with redirect_stderr(io.StringIO()):  # torch.fx prints what goes wrong in a graph
                found = runs(module, inputs, self.training, self.precision, len(self.outputs))
                return _difference(self.outputs, found), None
        except Exception as failure:
            return math.inf, failure


def run_of(original: nn.Module, inputs: Inputs, training: bool) -> Run:
    """What the original gives. It may look at the dtype of its weights, or write into them: then
    all are copied at once. Raises whatever it raises where it refuses these inputs."""
    ways: tuple[Precision, ...] = ("ops", "whole", "own")
    refusal: Exception | None = None
    for precision in ways:
        try:
            found = Run(inputs, training, precision, runs(original, inputs, training, precision))
        except Exception as error:
            refusal = error
            continue
        if not tensors_of(found.outputs[0]):
            kind = type(found.outputs[0]).__name__
            raise VerificationError(
                f"nobody can compare the original's output: no tensors are seen in a {kind}; "
                "return tensors, or lists, dicts or dataclasses of them"
            )
        if not found.is_defined():  # noise divided by how much it varies
            with suppress(Exception):
                spread = Run(inputs, training, "spread", runs(original, inputs, training, "spread"))
                return spread if spread.is_defined() else found
        return found
    assert refusal is not None
    raise refusal


def _difference(expected: list[Any], found: list[Any]) -> float:
    """As `difference`, over all calls; infinite where there are other tensors."""
    if [len(tensors_of(a)) for a in expected] != [len(tensors_of(b)) for b in found]:
        return math.inf
    return max(difference(a, b, least=expected[0]) for a, b in zip(expected, found, strict=True))


def difference(expected: Any, found: Any, least: Any = ()) -> float:
    """The largest difference between two outputs, relative to the largest number expected, or to
    that in `least`, another output: what a call gives may be no more than a change."""
    worst = 0.0
    scales = [_largest(t) for t in tensors_of(least)]
    for at, (a, b) in enumerate(zip(tensors_of(expected), tensors_of(found), strict=True)):
        if a.numel() == 0:
            continue
        if a.shape != b.shape:
            return math.inf
        a, b = a.to(torch.float64), b.to(torch.float64)
        scale = max(_largest(a), *scales[at : at + 1], torch.finfo(torch.float64).tiny)
        error = float((a - b).masked_fill(a == b, 0.0).abs().max()) / scale  # equal infinities too
        if math.isnan(error):
            return math.nan
        worst = max(worst, error)
    return worst


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
