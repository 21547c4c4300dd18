"""Verify: run the original and the rewritten module side by side, in float64, in both modes.

Where a kernel of the original knows no float64, both run in the dtype that they have.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any, Literal

import torch
from torch import Tensor, nn

from demp_fx.errors import VerificationError
from demp_fx.inputs import ExampleInputs, Inputs
from demp_fx.passes.doubled import InFloat64
from demp_fx.passes.outcome import Verification
from demp_fx.passes.still import Still
from demp_fx.passes.trials import fresh, resized
from demp_fx.tracing.preserve import CONSTANT, preserved
from demp_fx.trees import tensors_of

TOLERANCE = 1e-9  # relative, in float64; rounding alone stays below 1e-12
FOLDED = 16  # units of rounding of the parameters' own dtype, where constants were folded into them
ROUGH = 1000  # such units, where all is computed in that dtype

Precision = Literal["ops", "whole", "own"]


def verify(
    original: nn.Module, narrow: nn.Module, example_inputs: ExampleInputs, *,
    observed: bool = False, train: bool = True, folded: bool = False,
    traced: nn.Module | None = None,
) -> Verification:  # fmt: skip
    """Compare two modules on `example_inputs` (or a calibration batch).

    Unless something was only `observed` on data, fresh inputs of another batch size are tried too;
    where the `traced` original does not follow the original there, the example inputs alone count.
    `folded`: parameters were computed anew, and are rounded to their dtype. Raises
    `VerificationError` where the two differ by more than the tolerance. Neither is changed.
    """
    coarse = max((torch.finfo(p.dtype).eps for p in narrow.parameters()
                  if p.is_floating_point()), default=0.0)  # fmt: skip
    # what the original makes in its forward, it makes in float64 here
    made = [t for name, t in narrow.named_buffers() if CONSTANT in name and _is_real(t)]
    rounded = [coarse] * folded + [torch.finfo(t.dtype).eps for t in made]
    tolerance = max(TOLERANCE, FOLDED * max(rounded, default=0.0))
    inputs = Inputs.of(example_inputs)
    trials = [inputs] if observed else [fresh(inputs, extra=1), inputs]
    errors: dict[bool, float | None] = {}
    ways: dict[bool, Precision] = {}
    batch, fixed = 0, False
    refusal: Exception | None = None
    for training in (False, True) if train else (False,):
        errors[training] = None
        for trial in trials:
            expected, precision = _expected(original, trial, training)
            if isinstance(expected, Exception):
                refusal = expected
                continue  # a batch size, or a mode, that the original itself does not take
            if precision == "own":
                tolerance = max(tolerance, ROUGH * coarse)
            error, failure = _error(narrow, trial, training, precision, expected)
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
                again, _ = _error(original, trial, training, precision, expected)
                if not again <= tolerance:
                    mode = "train" if training else "eval"
                    raise VerificationError(
                        f"the original's own output is another one each time in {mode} mode (by "
                        f"{again:.1e}): its code takes random numbers that are not torch's, and "
                        "what they decided was traced; nothing was handed over"
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
    sized = False in ways and not (observed or fixed) and _goes_another_way(
        original, narrow, traced, resized(inputs), ways[False], tolerance
    )  # fmt: skip
    return Verification(
        eval_error=math.nan if errors[False] is None else errors[False],
        train_error=errors.get(True), tolerance=tolerance, batch=batch, fixed=fixed, sized=sized,
    )  # fmt: skip


def _goes_another_way(
    original: nn.Module, narrow: nn.Module, traced: nn.Module | None, trial: Inputs | None,
    precision: Precision, tolerance: float,
) -> bool:  # fmt: skip
    """Whether the original's code decides by the size of an image, so that neither the traced nor
    the narrow module follow it on a `trial` of another size. Raises `VerificationError` where the
    narrow one alone does not."""
    if trial is None:
        return False
    try:
        expected = run(original, trial, False, precision)
    except Exception:  # it takes one size only
        return False
    error, failure = _error(narrow, trial, False, precision, expected)
    if error <= tolerance:
        return False
    if traced is not None and not _error(traced, trial, False, precision, expected)[0] <= tolerance:
        return True
    sizes = [tuple(t.shape) for t in trial.tensors]
    raise VerificationError(
        f"on inputs of shape {sizes} the narrow module differs from the original by {error:.1e} "
        f"({failure or 'relative, float64'}); nothing was handed over"
    )


def _error(
    module: nn.Module, trial: Inputs, training: bool, precision: Precision, expected: Any
) -> tuple[float, Exception | None]:
    """How far a module's output is from the expected one, and why it has none at all."""
    try:
        with redirect_stderr(io.StringIO()):  # torch.fx prints what goes wrong in a graph
            return _difference(expected, run(module, trial, training, precision)), None
    except Exception as failure:
        return math.inf, failure


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def followed_mode(narrow: nn.Module) -> list[str]:
    """The lines of the original's code that ask for the mode, and were traced in one of them."""
    notes = getattr(narrow, "meta", {}).get("demp_fx")
    return [line for line in notes.baked if line.endswith(" mode")] if notes else []


def _difference(expected: Any, found: Any) -> float:
    """As `difference`; infinite where there are other tensors."""
    same = len(tensors_of(expected)) == len(tensors_of(found))
    return difference(expected, found) if same else math.inf


def _expected(original: nn.Module, inputs: Inputs, training: bool) -> tuple[Any, Precision]:
    """The original's output (or why it refuses these inputs), and how it was computed. It may look
    at the dtype of its weights, or write into them: then all of them are copied at once."""
    ways: tuple[Precision, ...] = ("ops", "whole", "own")
    refusal: Exception | None = None
    for precision in ways:
        try:
            expected = run(original, inputs, training, precision)
        except Exception as error:
            refusal = error
            continue
        if not tensors_of(expected):
            kind = type(expected).__name__
            raise VerificationError(
                f"nobody can compare the original's output: no tensors are seen in a {kind}; "
                "return tensors, or lists, dicts or dataclasses of them"
            )
        return expected, precision
    return refusal, "own"


def run(module: nn.Module, inputs: Inputs, training: bool, precision: Precision = "ops") -> Any:
    """The output without gradients, randomness or a trace on the module, whatever it keeps.

    `precision`: in float64, to which "ops" convert weights, or the "whole" module at once; or in
    the "own" dtype of the parameters. Inputs are copies: code may write into them (`x *= 255`).
    """
    double = precision != "own"
    inputs = inputs.map(
        lambda t: t.to(torch.float64 if double and t.is_floating_point() else t.dtype, copy=True)
    )
    modes = [(m, m.training) for m in module.modules()]
    try:
        _follow(module, training)
        with preserved(module.modules()), torch.no_grad(), ExitStack() as stack:
            kept = [stack.enter_context(_swapped(part, precision)) for part in module.modules()]
            stack.enter_context(Still())
            if double:
                stack.enter_context(InFloat64([t for tensors in kept for t in tensors]))
            return module(*inputs.args, **inputs.kwargs)
    finally:
        for m, mode in modes:
            m.training = mode


def _follow(module: nn.Module, training: bool) -> None:
    """Put a module into a mode; what torch.export has made refuses to be asked, and has but one."""
    try:
        module.train(training)
    except NotImplementedError:
        for part in module.modules():
            part.training = training


def difference(expected: Any, found: Any) -> float:
    """The largest difference between two outputs, relative to the largest number expected."""
    worst = 0.0
    for a, b in zip(tensors_of(expected), tensors_of(found), strict=True):
        if a.numel() == 0:
            continue
        if a.shape != b.shape:
            return math.inf
        a, b = a.to(torch.float64), b.to(torch.float64)
        scale = max(float(a.abs().max()), torch.finfo(torch.float64).tiny)
        error = float((a - b).abs().max()) / scale
        if math.isnan(error):
            return math.nan
        worst = max(worst, error)
    return worst


@contextmanager
def _swapped(part: nn.Module, precision: Precision) -> Iterator[list[Tensor]]:
    """Copies in a module's own tables, in float64 unless in their "own" dtype. Buffers come back as
    they were, not as updated, and so do tensors that are attributes, which are buffers of the
    narrow module. With "ops", weights stay what they are: those are returned (but none of recurrent
    layers, which ask their dtype)."""
    dtype = None if precision == "own" else torch.float64
    tables: list[dict[str, Any]] = [part._parameters, part._buffers, vars(part)]
    before = [{k: t for k, t in table.items() if isinstance(t, Tensor)} for table in tables]
    if isinstance(part, torch.jit.ScriptModule):
        with _inside([t for table in before for t in table.values()], dtype):
            yield []
        return
    kept = []
    if precision == "ops" and not isinstance(part, nn.RNNBase):
        kept = [t for t in before[0].values() if t.dim() > 1]
    whole, held = {id(t) for t in kept}, [t.data for t in kept]
    try:
        for table, saved in zip(tables, before, strict=True):
            for key, tensor in saved.items():
                if id(tensor) not in whole:
                    to = dtype if tensor.is_floating_point() else None
                    table[key] = tensor.detach().to(to, copy=True)
        yield kept
    finally:
        for table, saved in zip(tables, before, strict=True):
            table.update(saved)
    exchanged = [(t, data) for t, data in zip(kept, held, strict=True) if not t.is_set_to(data)]
    for tensor, data in exchanged:  # `weight.data = weight.data * mask`, which no mode sees
        tensor.data = data
    if exchanged:
        raise RuntimeError("a weight would be changed")


@contextmanager
def _inside(tensors: list[Tensor], dtype: torch.dtype | None) -> Iterator[None]:
    """The same for TorchScript, whose tables nobody can write to: the tensors get other numbers."""
    before = [t.data for t in tensors]
    try:
        for t in tensors:
            t.data = t.data.to(dtype if t.is_floating_point() else None, copy=True)
        yield
    finally:
        for t, data in zip(tensors, before, strict=True):
            t.data = data
