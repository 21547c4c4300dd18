"""Arguments by name that have a place: `F.softmax(input=x, dim=-1)`. In the graph they are where
all that reads nodes looks for them."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from torch.fx.operator_schemas import get_signature_for_torch_op

_PLACED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def in_place(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of torch's own code, none of which has been given by its place."""
    if args or not kwargs or not str(getattr(function, "__module__", None)).startswith("torch"):
        return args, kwargs
    for parameters in _signatures(function):
        if kwargs.keys() <= parameters.keys():
            placed = (n for n, p in parameters.items() if p.kind in _PLACED and n != "self")
            names = list(itertools.takewhile(kwargs.__contains__, placed))
            rest = {name: value for name, value in kwargs.items() if name not in names}
            return tuple(kwargs[name] for name in names), rest
    return args, kwargs


@functools.cache
def _signatures(function: Callable[..., Any]) -> list[dict[str, inspect.Parameter]]:
    """The parameters in each signature of a function (or of the `forward` of a layer)."""
    try:
        signatures = [inspect.signature(function)]
    except ValueError:  # it is none of Python's
        signatures = get_signature_for_torch_op(function) or []
    return [dict(signature.parameters) for signature in signatures]
