"""`len(x)` and `int(x.shape[0])` in a model's code: Python wants numbers of them, and would have
those of the example for good. Under their names in the model's own modules they give sizes back."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from demp_fx.tracing.values import UNKNOWN


def _known(value: Any) -> Any:
    """What is known of a proxy; nothing of anything else."""
    if not isinstance(value, fx.Proxy):
        return UNKNOWN
    tracer: Any = value.tracer
    return tracer.values.of(value)


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(_known(value), Tensor) else len(value)


class _Int(type):
    """The type of what stands in for `int`, and is it in all but `is`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and type(_known(args[0])) is int:
            return args[0]
        return int(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, int) or type(_known(instance)) is int

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is int

    def __hash__(cls) -> int:
        return hash(int)


class _Whole(int, metaclass=_Int):
    pass


def _package(space: dict[str, Any]) -> str:
    return str(space.get("__name__", "")).partition(".")[0]


@contextmanager
def sizes_stay(root: nn.Module) -> Iterator[None]:
    """Meanwhile the code around the forwards of `root`'s modules finds these under the names, and
    that around the functions which it has from other modules of its package."""
    forwards = {
        inspect.unwrap(type(module).forward)
        for module in root.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    }
    spaces = {id(space): space for f in forwards if (space := getattr(f, "__globals__", None))}
    for space in list(spaces.values()):
        package = _package(space)
        for f in space.values():
            if isinstance(f, types.FunctionType) and _package(f.__globals__) == package:
                spaces.setdefault(id(f.__globals__), f.__globals__)
    with ExitStack() as stack:
        for space in spaces.values():
            own = not space.get("__name__", "").startswith("torch.")
            for name, stand_in in {"len": _length, "int": _Whole}.items():
                if own and name not in space:
                    space[name] = stand_in
                    stack.callback(space.pop, name)
        yield
