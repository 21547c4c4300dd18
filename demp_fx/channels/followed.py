"""Autograd functions: what the ops of a forward and of its own backward couple."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from demp_fx.channels.custom import FunctionOp
from demp_fx.channels.facts import Facts
from demp_fx.channels.value import Call, Value
from demp_fx.trees import tensors_of

if TYPE_CHECKING:
    from demp_fx.channels.stream import Stream

aten = torch.ops.aten
_NONE = torch.zeros(0, dtype=torch.int64)
SETS_NO_CONTEXT = torch.autograd.function._SingleLevelFunction.setup_context


class _Context:
    """What a forward keeps for its backward. A forward that says that it writes into its inputs, or
    anything else that is not here, is not followed."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (True,) * count
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    @property
    def saved_variables(self) -> tuple[Any, ...]:  # as it was called once
        return self.saved_tensors

    def mark_non_differentiable(self, *_: Tensor) -> None: ...

    def set_materialize_grads(self, _: bool) -> None: ...


def follow(walk: Stream, call: Call) -> bool:
    """Run a function's forward, and its backward on gradients that have the channels of what the
    forward gives; whether it was followed.

    The function stays what it is: nobody can tell it inside how many zeros have gone. So what takes
    sums or averages over channels keeps all of them.
    """
    op: Any = call.op
    if not isinstance(op, FunctionOp) or call.kwargs:
        return False
    function, context, start = op.apply.function, _Context(len(call.args)), walk.system.mark()
    try:
        with walk:
            walk.zeros_matter = True
            if function.setup_context is SETS_NO_CONTEXT:
                found = function.forward(context, *call.args)
            else:
                found = function.forward(*call.args)
                function.setup_context(context, call.args, found)
            outputs = [walk.value(t) for t in tensors_of(found)]
            mark, count = walk.system.mark(), len(walk.system.pins)
            walk.zeros_matter = False
            _go_back(walk, call, context, outputs)
            mixed = torch.cat([_NONE, *(pin.atoms for pin in walk.system.pins[count:])])
            walk.system.forget(mark)
            walk.zeros_matter = True
            _go_back(walk, call, context, outputs)
    except Exception:  # it does not run on shapes alone
        walk.abandon(start, "goes into a function whose backward is not followed")
        return False
    finally:
        walk.zeros_matter = None
    for out, value in zip(call.outputs, outputs, strict=True):
        known = _unmixed(value, mixed)
        out.__dict__["demp"] = replace(value, known=known, data=None, version=walk.version(out))
    return True


def _go_back(walk: Stream, call: Call, context: _Context, outputs: list[Value]) -> None:
    """Run the backward. A gradient has the channels of what it is the gradient of."""
    op: Any = call.op
    gradients = [torch.empty_like(t) for t in call.outputs]
    for gradient, value in zip(gradients, outputs, strict=True):
        walk.give(gradient, value.labels)
    given = op.apply.function.backward(context, *gradients)
    given = given if isinstance(given, tuple) else (given,)
    for x, gradient in zip(call.args, given, strict=False):
        if isinstance(x, Tensor) and isinstance(gradient, Tensor):
            aten.add.Tensor(x, gradient)


def _unmixed(value: Value, mixed: Tensor) -> Facts | None:
    """What is known of a result, but for channels with gradients that others depend on: who reads
    such a channel goes on reading it, zero or not."""
    facts = value.facts
    for label in value.labels if facts is not None else ():
        if facts is not None:
            facts = Facts.of(facts.flat & ~torch.isin(label, mixed), facts.values)
    return facts
