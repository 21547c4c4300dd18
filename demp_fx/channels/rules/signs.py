"""Signs: a negative constant times what is never negative is never positive, and dies in a ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.signs import rectifies
from demp_fx.channels.stream import Stream
from demp_fx.channels.value import Call


def never_positive(walk: Stream, call: Call) -> Tensor | None:
    """Of a product: the elements, where one factor is a negative constant and the other one never
    negative. A mask that broadcasts to the result."""
    if call.op._schema.name.rstrip("_") != "aten::mul" or len(call.tensors) != 2:
        return None
    values = [walk.value(t) for t in call.tensors]
    for value, other in (values, values[::-1]):
        if other.never_negative and value.facts is not None:
            negative = value.facts.flat & (value.facts.values < 0).all(0)
            if bool(negative.any()):
                lead = call.outputs[0].dim() - negative.dim()
                return negative.reshape((1,) * lead + negative.shape)
    return None


def rectified(walk: Stream, call: Call, facts: Facts | None) -> Facts | None:
    """The facts of a result, with the zeros that a ReLU makes of what is never positive."""
    mask = walk.value(call.tensors[0]).never_positive if call.tensors else None
    if mask is None or not rectifies(call):
        return facts
    zero = Facts.of(mask, torch.zeros((2, *mask.shape), dtype=torch.float64))
    return facts if zero is None else zero.under(facts)
