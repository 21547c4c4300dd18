"""Rules for operations of your own: one decorator says what such an operation does with channels.

Without a rule an operation that demp_fx does not know is left alone: what goes into it stays as it
is, and the report names it. With one, channels are cut on both sides of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from torch.autograd import Function

from demp_fx.channels.custom import function_name
from demp_fx.channels.rules import RULES, contract, move, pointwise
from demp_fx.channels.rules.operand import Operand
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call
from demp_fx.errors import UsageError

__all__ = ["Call", "Stream", "rule"]

T = TypeVar("T")

FAMILIES: dict[str, Rule] = {"pointwise": pointwise.pointwise, "move": move.move}


def rule(op: str | type[Function], family: str | None = None) -> Callable[[T], T]:
    """Say what an operation does with channels.

    Args:
        op: the name of a `torch.library` operation ("mylib::myop", all its overloads), or an
            `autograd.Function`.
        family: "pointwise": each number of the result depends on the numbers of the operands at its
            own place, after broadcasting. "move": the result holds numbers of its first operand,
            in other places; the kernel has to take any dtype. An einsum equation of two operands,
            such as "...i,oi->...o", or of three where the last one is a bias ("...i,oi,o->...o"):
            the operation computes exactly that. None: the decorated function is the rule; it gets
            the walk and the call, and records what it couples.

    Returns a decorator that leaves what it decorates as it is. With a `family` it takes effect at
    once, so it need not decorate anything. Raises `UsageError` for an operation of torch's own, and
    for an equation that it does not understand.
    """
    name = op if isinstance(op, str) else function_name(op)
    if name.startswith(("aten::", "prims::")) or (isinstance(op, str) and "::" not in op):
        raise UsageError(f"{name!r} is no operation of your own: name it as 'mylib::myop'")
    if family is not None:
        RULES[name] = FAMILIES[family] if family in FAMILIES else _contraction(family)
        return lambda thing: thing

    def decorate(function: Any) -> Any:
        RULES[name] = function
        return function

    return decorate


_OPERAND = r"(?:\.\.\.)?[a-zA-Z]*"


def _contraction(equation: str) -> Rule:
    """The rule of an einsum equation: letters that are summed are read, all others pass."""
    compact = equation.replace(" ", "")
    found = re.fullmatch(rf"({_OPERAND}),({_OPERAND})(?:,([a-zA-Z]))?->({_OPERAND})", compact)
    if found is None:
        known = ", ".join(repr(name) for name in FAMILIES)
        raise UsageError(
            f"{equation!r} is neither {known} nor an einsum equation of two operands and perhaps a "
            "bias, such as '...i,oi,o->...o'"
        )
    left, right, bias, result = found.groups()
    if bias is not None and not result.endswith(bias):
        raise UsageError(f"{equation!r}: the bias has to be along the last dim of the result")

    def apply(walk: Stream, call: Call) -> None:
        a, b = call.tensors[:2]
        free = max(t.dim() - len(x.replace(".", "")) for t, x in ((a, left), (b, right)))
        spread = "".join(chr(0x3B1 + k) for k in range(free))  # letters that no equation uses

        def letters(side: str, rank: int) -> str:
            count = rank - len(side.replace(".", ""))
            return side.replace("...", spread[free - count :] if count else "")

        contract.meet(
            walk, call, Operand(a, letters(left, a.dim())),
            Operand(b, letters(right, b.dim())),
            letters(result, call.outputs[0].dim()),
            call.tensors[2] if bias is not None and len(call.tensors) > 2 else None,
        )  # fmt: skip

    return apply
