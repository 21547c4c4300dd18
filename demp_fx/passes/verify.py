"""Verify: run the original and the rewritten module side by side, in float64, in both modes.

Where a kernel of the original knows no float64, both run in the dtype that they have.
"""

from __future__ import annotations

import io
import math
from contextlib import redirect_stderr, suppress
from typing import Any

import torch
from torch import Tensor, nn

from demp_fx.errors import VerificationError
from demp_fx.inputs import ExampleInputs, Inputs
from demp_fx.passes.calls import Precision, run, runs
from demp_fx.passes.narrow import ROUNDED
from demp_fx.passes.outcome import Verification
from demp_fx.passes.trials import fresh, resized, shortened
from demp_fx.tracing.memo import forgotten
from demp_fx.tracing.preserve import CONSTANT, TABLES
from demp_fx.trees import tensors_of
from demp_fx.turns import in_turn

TOLERANCE = 1e-9  # relative, in float64; rounding alone stays below 1e-12
FOLDED = 16  # units of rounding of the parameters' own dtype, where constants were folded into them
ROUGH = 1000  # such units, where all is computed in that dtype
SHAKEN = 2.0**-50  # by how much inputs are moved to see what becomes of rounding: four units of it
AMPLIFIED = 8  # so often as far as the original moves then the narrow module may be away,
LOOSEST = 1e-5  # but no farther than that


@in_turn
def verify(
    original: nn.Module, narrow: nn.Module, example_inputs: ExampleInputs, *,
    observed: bool = False, train: bool = True, traced: nn.Module | None = None,
) -> Verification:  # fmt: skip
    """Compare two modules on `example_inputs` (or a calibration batch).

    Unless something was only `observed` on data, fresh inputs of another batch size are tried too;
    where the `traced` original does not follow the original there, the example inputs alone count.
    A second call follows where the first one changes what the original keeps; it counts where the
    `traced` one keeps it as well.
    Raises `VerificationError` where the two differ by more than the tolerance, which is larger
    where parameters of `narrow` were computed anew and rounded. Neither is changed.
    """
    notes = getattr(narrow, "meta", {}).get("demp_fx")
    with forgotten(original, notes.memos if notes else ()):
        inputs = Inputs.of(example_inputs)
        return _compare(original, narrow, inputs, observed, train, traced)


def _compare(
    original: nn.Module, narrow: nn.Module, inputs: Inputs, observed: bool, train: bool,
    traced: nn.Module | None,
) -> Verification:  # fmt: skip
    coarse = max((torch.finfo(p.dtype).eps for p in narrow.parameters()
                  if p.is_floating_point()), default=0.0)  # fmt: skip
    # what the original makes in its forward, it makes in float64 here
    made = [t for name, t in narrow.named_buffers() if CONSTANT in name]
    # and what it keeps of earlier calls, for each size, is made at each call
    made += [t for m in original.modules() for t in _cached(m)]
    folded = getattr(narrow, "meta", {}).get(ROUNDED, False)
    rounded = [coarse] * folded + [torch.finfo(t.dtype).eps for t in made if _is_real(t)]
    tolerance = max(TOLERANCE, FOLDED * max(rounded, default=0.0))
    trials = [inputs] if observed else [fresh(inputs, extra=1), inputs]
    errors: dict[bool, float | None] = {}
    ways: dict[bool, Precision] = {}
    batch, fixed, forgets = 0, False, False
    refusal: Exception | None = None
    for training in (False, True) if train else (False,):
        errors[training], mode = None, "train" if training else "eval"
        for trial in trials:
            expected, precision = _expected(original, trial, training)
            if isinstance(expected, Exception):
                refusal = expected
                continue  # a batch size, or a mode, that the original itself does not take
            if trial is not inputs and not _is_defined(expected):
                continue  # random numbers are outside of what it is defined on
            if precision == "own":
                tolerance = max(tolerance, ROUGH * coarse)
            error, failure = _error(narrow, trial, training, precision, expected)
            if tolerance < error <= LOOSEST:
                moved = _amplified(original, trial, training, precision, expected)
                tolerance = max(tolerance, moved)
            if not error <= tolerance and traced is not None and len(expected) > 1:
                followed, _ = _error(traced, trial, training, precision, expected)
                if not followed <= tolerance:
                    expected = expected[:1]
                    error, failure = _error(narrow, trial, training, precision, expected)
                    forgets = forgets or error <= tolerance
            if not error <= tolerance:
                if training != narrow.training and followed_mode(narrow):
                    break  # in this mode the original goes another way, which the trace has noted
                if trial is not inputs and traced is not None:
                    followed, _ = _error(traced, trial, training, precision, expected)
                    if not followed <= tolerance:
                        fixed = True
                        continue
                if failure is not None:
                    sizes = [tuple(t.shape) for t in trial.tensors]
                    raise VerificationError(
                        f"the narrow module does not take inputs of shape {sizes}, which the "
                        f"original takes: {failure}; nothing was handed over"
                    ) from failure
                if not _is_defined(expected):
                    raise VerificationError(
                        "the original's own output has numbers in it that are none (nan) in "
                        f"{mode} mode, and cannot be compared; nothing was handed over"
                    )
                again, _ = _error(original, trial, training, precision, expected)
                if not again <= tolerance:
                    raise VerificationError(
                        f"the original's own output is another one each time in {mode} mode (by "
                        f"{again:.1e}): its code takes random numbers that are not torch's, and "
                        "what they decided was traced; nothing was handed over"
                    )
                if traced is not None:
                    followed, _ = _error(traced, trial, training, precision, expected)
                    if not followed <= tolerance:
                        raise VerificationError(
                            "the graph that was traced does not compute what the original does "
                            f"(it differs by {followed:.1e} with nothing cut): its code changes "
                            "something on the way that was not followed; nothing was handed over"
                        )
            errors[training], ways[training] = error, precision
            batch = max(batch, trial.tensors[0].shape[0] if trial.tensors[0].dim() else 1)
            break
    compared = {mode: error for mode, error in errors.items() if error is not None}
    if not compared:
        raise VerificationError(
            f"the original runs on none of these inputs, and nothing was compared: {refusal}"
        ) from refusal
    for training, error in compared.items():
        if not error <= tolerance:
            raise VerificationError(
                f"the narrow module differs from the original in {'train' if training else 'eval'} "
                f"mode by {error:.1e} (relative, float64; tolerance {tolerance:.0e}); nothing was "
                "handed over"
            )
    sized = False
    if False in ways and not (observed or fixed):
        sized = _decides_by_sizes(original, narrow, traced, inputs, ways[False], tolerance)
    return Verification(
        eval_error=errors[False],
        train_error=errors.get(True), tolerance=tolerance, batch=batch, fixed=fixed, sized=sized,
        forgets=forgets,
    )  # fmt: skip


def _decides_by_sizes(
    original: nn.Module, narrow: nn.Module, traced: nn.Module | None, inputs: Inputs,
    precision: Precision, tolerance: float,
) -> bool:  # fmt: skip
    """Whether images of another size, or sequences of another length, are found to go another way
    than the example."""

    def goes(trial: Inputs | None, odd: bool) -> bool | None:
        return _goes_another_way(original, narrow, traced, trial, precision, tolerance, odd)

    images = goes(resized(inputs, odd=True), odd=True)
    if images is not False:
        images = goes(resized(inputs), odd=False) or images
    sequences = [goes(shorter, odd=True) for shorter in shortened(inputs)]
    return images is True or True in sequences


def _goes_another_way(
    original: nn.Module, narrow: nn.Module, traced: nn.Module | None, trial: Inputs | None,
    precision: Precision, tolerance: float, odd: bool,
) -> bool | None:  # fmt: skip
    """Whether the original's code decides by sizes, so that neither the traced nor the narrow
    module follow it on a `trial` of another size; None where it does not take that.
    Raises `VerificationError` where the narrow one alone does not follow; but it may refuse `odd`
    sizes, at which some networks add up maps that only happen to fit."""
    if trial is None:
        return None
    try:
        expected = [run(original, trial, False, precision)]
    except Exception:
        return None
    error, failure = _error(narrow, trial, False, precision, expected)
    if error <= tolerance:
        return False
    if error <= _amplified(original, trial, False, precision, expected):
        return False
    if traced is not None and not _error(traced, trial, False, precision, expected)[0] <= tolerance:
        return True
    if odd and failure is not None:
        return True
    sizes = [tuple(t.shape) for t in trial.tensors]
    raise VerificationError(
        f"on inputs of shape {sizes} the narrow module differs from the original by {error:.1e} "
        f"({failure or 'relative, float64'}); nothing was handed over"
    )


def _error(
    module: nn.Module, trial: Inputs, training: bool, precision: Precision, expected: list[Any]
) -> tuple[float, Exception | None]:
    """How far a module's outputs, call by call, are from the expected ones, and why it has none at
    all."""
    try:
        with redirect_stderr(io.StringIO()):  # torch.fx prints what goes wrong in a graph
            found = runs(module, trial, training, precision, len(expected))
            return _difference(expected, found), None
    except Exception as failure:
        return math.inf, failure


def _amplified(
    original: nn.Module, trial: Inputs, training: bool, precision: Precision, expected: list[Any]
) -> float:
    """What rounding may come to: networks that divide by what is next to zero (by the spread of a
    single number, say) make much of the last digits."""
    if precision == "own":
        return 0.0
    shaken = trial.map(lambda t: t.to(torch.float64) * (1 + SHAKEN) if t.is_floating_point() else t)
    moved, _ = _error(original, shaken, training, precision, expected)
    return min(AMPLIFIED * moved, LOOSEST)


def _cached(module: nn.Module) -> list[Tensor]:
    """The tensors in dicts of a module's own."""
    own = vars(module).items()
    return tensors_of([v for name, v in own if type(v) is dict and name not in TABLES])


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def followed_mode(narrow: nn.Module) -> list[str]:
    """The lines of the original's code that ask for the mode, and were traced in one of them."""
    notes = getattr(narrow, "meta", {}).get("demp_fx")
    return [line for line in notes.baked if line.endswith(" mode")] if notes else []


def _difference(expected: list[Any], found: list[Any]) -> float:
    """As `difference`, over all calls; infinite where there are other tensors."""
    if [len(tensors_of(a)) for a in expected] != [len(tensors_of(b)) for b in found]:
        return math.inf
    return max(difference(a, b, least=expected[0]) for a, b in zip(expected, found, strict=True))


def _expected(
    original: nn.Module, inputs: Inputs, training: bool
) -> tuple[list[Any] | Exception, Precision]:
    """The original's output (or why it refuses these inputs), call by call, and how it was
    computed. It may look at the dtype of its weights, or write into them: then all are copied at
    once."""
    ways: tuple[Precision, ...] = ("ops", "whole", "own")
    refusal: Exception | None = None
    for precision in ways:
        try:
            expected = runs(original, inputs, training, precision)
        except Exception as error:
            refusal = error
            continue
        if not tensors_of(expected[0]):
            kind = type(expected[0]).__name__
            raise VerificationError(
                f"nobody can compare the original's output: no tensors are seen in a {kind}; "
                "return tensors, or lists, dicts or dataclasses of them"
            )
        if not _is_defined(expected):  # noise divided by how much it varies
            with suppress(Exception):
                spread = runs(original, inputs, training, "spread")
                if _is_defined(spread):
                    return spread, "spread"
        return expected, precision
    assert refusal is not None
    return refusal, "own"


def _is_defined(outputs: list[Any]) -> bool:
    return not any(bool(t.isnan().any()) for t in tensors_of(outputs))


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
