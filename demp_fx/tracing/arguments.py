"""One way to write a call: what reads nodes finds arguments and sizes where it looks for them.

Arguments that are given by name go to their places (`F.softmax(input=x, dim=-1)`), and sizes that
are computed as a whole are spelled out one by one (`x.view(y.shape[:-1] + (8,))`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.utils import _pytree as pytree

from demp_fx.tracing.values import UNKNOWN, Values

# Methods that take another tensor's sizes, and the same with the sizes spelled out.
LIKE = {"reshape_as": "reshape", "view_as": "view", "expand_as": "expand"}
# Methods and functions whose last argument may be all sizes of the result.
SHAPED: set[Any] = {"view", "reshape", "expand", "new_zeros", "new_ones", "new_empty"}
SHAPED |= {torch.reshape, torch.zeros, torch.ones, torch.empty}
# What takes dims one by one, also as tensors of one number: `x.permute(*order)`.
ORDERED: set[Any] = {"permute", "transpose", "movedim", torch.permute}
# What fills a new tensor with a number, the place of that, and what makes one without.
FILLED: dict[Any, tuple[int, Any]] = {
    "new_full": (2, "new_empty"), torch.full_like: (1, torch.empty_like)
}  # fmt: skip
_PLACED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def in_place(
    function: Callable[..., Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of torch's own code, all of which have been given by name."""
    if not str(getattr(function, "__module__", None)).startswith("torch"):
        return (), kwargs
    for parameters in _signatures(function):
        if kwargs.keys() <= parameters.keys():
            placed = (n for n, p in parameters.items() if p.kind in _PLACED and n != "self")
            names = list(itertools.takewhile(kwargs.__contains__, placed))
            rest = {name: value for name, value in kwargs.items() if name not in names}
            return tuple(kwargs[name] for name in names), rest
    return (), kwargs


def check_taken(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> None:
    """Raise the `TypeError` of a call with arguments that a function does not take."""
    if kwargs or not _takes(function, len(args)):
        inspect.signature(function, follow_wrapped=False).bind(*args, **kwargs)


@functools.cache
def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether it takes so many arguments by position, and needs no others."""
    try:
        inspect.signature(function, follow_wrapped=False).bind(*[None] * count)
    except TypeError:
        return False
    return True


@functools.cache
def _signatures(function: Callable[..., Any]) -> list[dict[str, inspect.Parameter]]:
    """The parameters in each signature of a function (or of the `forward` of a layer)."""
    try:
        signatures = [inspect.signature(function)]
    except ValueError:  # it is none of Python's
        signatures = get_signature_for_torch_op(function) or []
    return [dict(signature.parameters) for signature in signatures]


def spelled_out(target: Any, args: Any, values: Values) -> tuple[Any, Any]:
    """A target and its arguments: each size one of its own, each dim a number, an index of several
    dims a tuple, for the name of a tensor's type that tensor, and numbers for an array of them."""
    if target in ORDERED:
        x, *dims = args
        if any(type(dim) is not int for dim in dims):
            dims = pytree.tree_map_only(fx.Proxy, lambda dim: _number(dim, values), dims)
        return target, (x, *dims)
    if target is operator.getitem and isinstance(args[1], list) and any(map(_is_index, args[1])):
        return target, (args[0], tuple(args[1]))
    if target == "type" and len(args) == 2 and (like := _typed(args[1])) is not None:
        return "type_as", (args[0], like)
    if target == "new_tensor" and isinstance(args[-1], np.ndarray):  # its own type counts nothing
        return target, (*args[:-1], args[-1].tolist())
    shaped = target in SHAPED and args and isinstance(args[-1], fx.Proxy)
    if not shaped and not (target in LIKE and len(args) == 2):
        return target, args
    last: Any = args[-1]
    if target in LIKE:
        model = values.of(last)
        if not isinstance(model, Tensor):
            return target, args
        # only its sizes are meant: no reader of its channels
        return LIKE[target], (args[0], tuple(last.shape[d] for d in range(model.dim())))
    sizes = UNKNOWN if _is_one(last) else values.of(last)
    if isinstance(sizes, tuple):
        args = (*args[:-1], tuple(last[d] for d in range(len(sizes))))
    return target, args


def _typed(kind: Any) -> fx.Proxy | None:
    """The tensor of which `kind` is the type, a string that meta tensors cannot be given."""
    if not isinstance(kind, fx.Proxy) or kind.node.target != "type" or len(kind.node.args) != 1:
        return None
    return kind.tracer.proxy(kind.node.args[0])  # type: ignore[arg-type]


def filled(target: Any, args: Any, kwargs: dict[str, Any], values: Values) -> tuple[Any, ...]:
    """Of a call that fills a tensor with the number in another one: that, and the arguments of what
    makes one without. Only numbers can be looked up without those of the parameters."""
    place = FILLED[target][0]
    number = args[place] if place < len(args) else kwargs.get("fill_value")
    if not isinstance(values.of(number), Tensor):
        return ()
    rest = {name: value for name, value in kwargs.items() if name != "fill_value"}
    return number, args[:place], rest


def _number(proxy: fx.Proxy, values: Values) -> Any:
    """The number in a tensor that the code has made, of nothing but numbers; else the proxy."""
    value = values.of(proxy)
    if isinstance(value, Tensor) and value.dim() == 0:
        with contextlib.suppress(TypeError):
            return int(values.real(proxy.node, sized=False))
    return proxy


def _is_index(entry: Any) -> bool:
    """Whether an entry of a list is an index of a dim, which makes all of them that: more than a
    number, of which a list picks several."""
    if isinstance(entry, fx.Proxy):
        return isinstance(entry.tracer.values.of(entry), Tensor)  # type: ignore[attr-defined]
    return entry is None or entry is ... or isinstance(entry, (slice, list, tuple, Tensor))


def _is_one(size: Any) -> bool:
    """Whether code shows that this is one size, and not several."""
    if not isinstance(size, (fx.Node, fx.Proxy)):
        return isinstance(size, int)
    node = size.node if isinstance(size, fx.Proxy) else size
    if node.target in (operator.getitem, "size"):
        return len(node.args) == 2 and isinstance(node.args[1], int)
    arithmetic = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod)
    return node.target in arithmetic and all(map(_is_one, node.args))
