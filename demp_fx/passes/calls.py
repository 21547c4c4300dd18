"""Calls of a module as it is: in float64, without randomness, and without a trace on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from demp_fx.inputs import Inputs
from demp_fx.passes.doubled import InFloat64
from demp_fx.passes.still import Still
from demp_fx.tracing.preserve import preserved
from demp_fx.tracing.states import changed, held
from demp_fx.trees import tensors_of
from demp_fx.turns import default_device

Precision = Literal["ops", "whole", "own", "spread"]


def run(module: nn.Module, inputs: Inputs, training: bool, precision: Precision = "ops") -> Any:
    """The output without gradients, randomness or a trace on the module, whatever it keeps.

    `precision`: in float64, to which "ops" convert weights, or the "whole" module at once; or in
    the "own" dtype of the parameters; "spread" is "whole" with noise that varies. Inputs are
    copies: code may write into them (`x *= 255`).
    """
    return runs(module, inputs, training, precision, calls=1)[0]


def runs(
    module: nn.Module, inputs: Inputs, training: bool, precision: Precision,
    calls: int | None = None,
) -> list[Any]:  # fmt: skip
    """The outputs of so many calls in a row, as `run`. Left to the module, a second call is made
    where the first has changed what it keeps, and goes without saying where that fails or gives
    numbers that nothing can be compared with (the same inputs again may be too many for a cache,
    or differ by nothing from those before)."""
    double = precision != "own"

    def call() -> Any:
        given = inputs.map(
            lambda t: t.to(torch.float64 if double and t.is_floating_point() else t.dtype,
                           copy=True)
        )  # fmt: skip
        with default_device():
            return module(*given.args, **given.kwargs)

    modes = [(m, m.training) for m in module.modules()]
    try:
        _follow(module, training)
        with preserved(module.modules()), torch.no_grad(), ExitStack() as stack:
            kept = [stack.enter_context(_swapped(part, precision)) for part in module.modules()]
            weights = [t for part in module.modules() for t in _weights(part)]
            stack.enter_context(Still(precision == "spread"))
            if double:
                stack.enter_context(InFloat64([t for tensors in kept for t in tensors]))
            if calls is not None:
                return [call() for _ in range(calls)]
            before, written = held(module.modules(), weights), _versions(weights)
            outputs = [call()]
            if written != _versions(weights) or changed(before, module.modules(), weights):
                with suppress(Exception):
                    second = call()
                    outputs += [second] * all(bool(t.isfinite().all()) for t in tensors_of(second))
            return outputs
    finally:
        for m, mode in modes:
            m.training = mode


def _weights(part: nn.Module) -> list[Tensor]:
    """A module's own parameters of several dims: nearly all of its memory."""
    return [t for t in part._parameters.values() if t is not None and t.dim() > 1]


def _versions(weights: list[Tensor]) -> list[int]:
    """How often each was written into: too large to be compared with a copy."""
    return [t._version for t in weights]


def _follow(module: nn.Module, training: bool) -> None:
    """Put a module into a mode; what torch.export has made refuses to be asked, and has but one."""
    try:
        module.train(training)
    except NotImplementedError:
        for part in module.modules():
            part.training = training


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
        kept = _weights(part)
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
