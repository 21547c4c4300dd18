"""What is known of the result of an elementwise op: the op itself, run on what is known."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts, same_place
from demp_fx.channels.stream import Stream
from demp_fx.channels.value import Call

PRODUCTS = {"aten::mul", "aten::mul_"}
QUOTIENTS = {"aten::div", "aten::div_"}
# A mask, and the two values that it chooses between, by the names of the arguments.
CHOICES = {"aten::where": ("condition", "self", "other"),
           "aten::masked_fill": ("mask", "self", "value")}  # fmt: skip


def constants(walk: Stream, call: Call, out: Tensor) -> Facts | None:
    """Run the op on what is known of its operands (a product with a known zero is zero)."""
    logical = all(t.dtype == torch.bool for t in (out, *call.tensors))  # rounding flips comparisons
    if not (out.is_floating_point() or out.is_complex() or logical):
        return None
    if _times_zero(walk, call):
        return Facts.zeros(torch.ones((1,) * out.dim(), dtype=torch.bool))
    found = [walk.value(t).facts for t in call.tensors]
    chosen = _chosen(walk, call)
    if chosen is not None:
        return either(*chosen, out)
    facts = [f for f in found if f is not None]
    if not facts:
        return None
    if len(facts) < len(found):
        zeros = [
            f for f in _annihilating(walk, call, found) if f is not None and bool(f.zero.any())
        ]
        return _annihilated(zeros, out)
    facts = same_place(facts)
    known = functools.reduce(torch.logical_and, [f.flat for f in facts])
    values = _run(call, [f.values for f in facts])
    if walk.running.sized:  # what depends on a size of the example is no constant
        known &= (values == _run(call, [f.values for f in facts], moved=0.5)).all(0)
    if annihilating := _annihilating(walk, call, facts):
        zero = functools.reduce(torch.logical_or, [f.zero for f in annihilating])
        known, values = known | zero, torch.where(zero, 0.0, values)
    elif len(facts) == 1:
        known |= facts[0].known & (values == 0).all(0) & facts[0].zero
    result = Facts.of(known, values)
    return None if result is None else result.aligned(out.dim())


def _times_zero(walk: Stream, call: Call) -> bool:
    numbers = [a for a in call.args if type(a) in (int, float)]
    return call.op._schema.name in PRODUCTS and 0 in numbers and not walk.running.sized


def _annihilating(walk: Stream, call: Call, operands: list[Any]) -> list[Any]:
    """Those of the operands whose zeros make zeros of the result: factors, and what is divided."""
    name = call.op._schema.name
    if name in QUOTIENTS and len(call.tensors) == 2 and operands[0] is not None:
        return operands[:1] if _divides(walk, call.tensors[1], operands[0]) else []
    return operands if name in PRODUCTS else []


def _divides(walk: Stream, divisor: Tensor, facts: Facts) -> bool:
    """Whether zeros stay zeros where they are divided: by what is above zero, or by one number for
    all channels (0 / 0 is none, but then none is left of the others, either)."""
    value, shape = walk.value(divisor), facts.known.shape
    shared = any(n > 1 for n in shape) and not any(
        n > 1 and m > 1 for n, m in zip(reversed(shape), reversed(divisor.shape), strict=False)
    )
    return value.positive or (shared and value.facts is None)


def _chosen(walk: Stream, call: Call) -> tuple[Facts | None, Facts | None] | None:
    """What is known of the two values between which a mask chooses, where it is not known which."""
    names = CHOICES.get(call.op._schema.name.rstrip("_"))
    if names is None or walk.value(call.arg(names[0])).facts is not None:
        return None
    one, other = (call.arg(name) for name in names[1:])
    if isinstance(other, Tensor):
        return walk.value(one).facts, walk.value(other).facts
    if walk.running.sized:
        return walk.value(one).facts, None
    number = torch.tensor(other, dtype=call.outputs[0].dtype)
    return walk.value(one).facts, Facts.exactly(number)


def either(a: Facts | None, b: Facts | None, out: Tensor) -> Facts | None:
    """One of two values, nobody knows which: known where they agree."""
    if a is None or b is None:
        return None
    a, b = same_place([a, b])
    agree = a.flat & b.flat & (a.values == b.values).all(0)
    result = Facts.of(agree, a.values)
    return None if result is None else result.aligned(out.dim())


def _annihilated(facts: list[Facts], out: Tensor) -> Facts | None:
    if not facts:
        return None
    zero = functools.reduce(torch.logical_or, [f.zero for f in same_place(facts)])
    result = Facts.of(zero, torch.zeros((2, *zero.shape), dtype=torch.float64))
    return None if result is None else result.aligned(out.dim())


def _run(call: Call, values: list[Tensor], moved: float = 0.0) -> Tensor:
    """The op on numbers in the places of its tensor operands, in both modes; nan where they are no
    longer real. `moved`: how far from what they are all other numbers are taken to be."""
    feed = iter(values)

    def swap(a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return [swap(x) for x in a]
        if not isinstance(a, Tensor):
            return a + moved if moved and type(a) in (int, float) else a
        wide = torch.complex128 if a.is_complex() else torch.float64
        return next(feed).to(a.dtype if a.dtype == torch.bool else wide, copy=True)

    args = [swap(a) for a in call.args]
    kwargs = {k: swap(a) for k, a in call.kwargs.items() if k not in ("device", "dtype")}
    result = call.op(*args, **kwargs)
    first: Tensor = result if isinstance(result, Tensor) else result[0]
    if first.is_complex():
        first = torch.where(first.imag == 0, first.real, torch.nan)
    return first.to(torch.float64)
