"""`len(x)` and `int(x.shape[0])` in a model's code: Python wants numbers of them, and would have
those of the example for good. Under their names in the model's own modules they give sizes back."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from demp_fx.tracing.values import UNKNOWN

OTHERS = {"torch", "numpy", "einops", "einx"}  # packages whose code is no model's


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
        known = type(_known(args[0])) if len(args) == 1 else None
        if known is float:  # `windows / (height * width / window**2)` is how many images there are
            return args[0].tracer.create_proxy("call_function", math.trunc, args, {})
        return args[0] if known is int else int(*args, **kwargs)

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


@contextmanager
def sizes_stay(root: nn.Module) -> Iterator[None]:
    """Meanwhile the code around the forwards of `root`'s modules, and around the functions that it
    has from elsewhere, finds these under the names."""
    forwards = {
        inspect.unwrap(type(module).forward)
        for module in root.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    }
    found = (getattr(forward, "__globals__", {}) for forward in forwards)
    spaces = {id(space): space for space in found if _package(space) not in OTHERS}
    for space in list(spaces.values()):
        functions = [thing for thing in space.values() if isinstance(thing, FunctionType)]
        for there in [function.__globals__ for function in functions]:
            if _package(there) not in OTHERS | sys.stdlib_module_names:
                spaces.setdefault(id(there), there)
    with ExitStack() as stack:
        for space in spaces.values():
            for name, stand_in in {"len": _length, "int": _Whole}.items():
                if name not in space:
                    space[name] = stand_in
                    stack.callback(space.pop, name)
        yield


def _package(space: dict[str, Any]) -> str:
    """The package that a module's names are in."""
    return str(space.get("__name__", "")).partition(".")[0]
