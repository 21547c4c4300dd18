"""Signs: what is never negative, and what is above zero, whatever the network is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from demp_fx.channels.value import Call, Value

_NEVER_NEGATIVE = {"aten::sigmoid", "aten::hardsigmoid", "aten::exp", "aten::softplus", "aten::abs",
                   "aten::square", "aten::sqrt", "aten::norm", "aten::linalg_vector_norm",
                   "aten::var", "aten::std"}  # fmt: skip
_BOUNDS = {"aten::hardtanh": "min_val", "aten::clamp": "min", "aten::clamp_min": "min"}
# What is above zero where its operand is, and never negative where that never is; and what may be
# so small a number that it is rounded to zero.
_KEEPS = {"aten::sqrt", "aten::clone", "aten::detach", "aten::alias", "aten::amax", "aten::amin"}
_SHRINKS = {"aten::sum", "aten::mean", "aten::_to_copy", "aten::avg_pool2d"}


def rectifies(call: Call) -> bool:
    """Whether an elementwise op makes everything negative zero: a ReLU under any name."""
    name = call.op._schema.name.rstrip("_")
    bound = _BOUNDS.get(name)
    limit = None if bound is None else call.arg(bound)
    return name == "aten::relu" or (not isinstance(limit, Tensor) and limit == 0)


def is_never_negative(call: Call, first: Value) -> bool:
    """Whether no element of the result is; `first`: what is known of the first operand."""
    name = call.op._schema.name.rstrip("_")
    if name in _NEVER_NEGATIVE or rectifies(call) or is_positive(call, first):
        return True
    a, b = call.args[:2] if len(call.args) > 1 else (None, None)
    if name == "aten::pow":
        return isinstance(b, (int, float)) and b % 2 == 0
    if name == "aten::mul" and a is b:
        return True
    keeps = call.op.is_view or name in _KEEPS | _SHRINKS
    return keeps and len(call.tensors) == 1 and first.never_negative


def is_positive(call: Call, first: Value) -> bool:
    """Whether all elements of the result are above zero, in its dtype."""
    name, out = call.op._schema.name.rstrip("_"), call.outputs[0]
    if len(call.tensors) != 1 or not out.is_floating_point():
        return False
    if call.op.is_view or name in _KEEPS:
        return first.positive
    if name in _BOUNDS:
        bounds = [b for b in (call.arg(_BOUNDS[name]), call.arg("max")) if b is not None]
        return call.arg(_BOUNDS[name]) is not None and all(_is_above(b, out) for b in bounds)
    adds = name == "aten::add" and first.never_negative and call.arg("alpha") == 1
    return adds and _is_above(call.args[1], out)


def _is_above(number: Any, out: Tensor) -> bool:
    """Whether a number is above zero when it is rounded."""
    return isinstance(number, (int, float)) and bool(torch.tensor(number, dtype=out.dtype) > 0)
