"""Autograd functions in a graph: one node each, so that their own backward stays."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree as pytree

_STEPS = ("forward", "setup_context")  # what `Function.apply` calls


class Apply:
    """Calls an autograd function. `Function.apply` itself says that it is torch's own, and
    torch.fx would write it as such."""

    def __init__(self, function: type[Function]) -> None:
        self.function = function
        self.__module__ = function.__module__
        self.__name__ = function.__name__
        self.__qualname__ = f"{function.__qualname__}.apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)

    def __repr__(self) -> str:
        return self.__qualname__

    def __reduce__(self) -> tuple[Any, ...]:
        return apply_of, (self.function,)


@functools.cache
def apply_of(function: type[Function]) -> Apply:
    """What calls an autograd function: one object, as code has one name for it."""
    return Apply(function)


@contextmanager
def as_nodes(tracer: fx.Tracer) -> Iterator[None]:
    """Meanwhile `Function.apply` of a proxy is a node that calls it.

    Left alone it would run the forward on proxies, and the graph's gradient would be that of the
    forward. What is replaced is the forward that every `apply` looks up, however early itself was
    looked up. Torch's own functions (checkpointing, hooks) run through: their gradient is that of
    their forward.
    """
    plain = type.__getattribute__

    def lookup(cls: Any, name: str) -> Any:
        found = plain(cls, name)
        if name not in _STEPS or plain(cls, "__module__").startswith("torch."):
            return found
        split = plain(cls, "setup_context") is not _SingleLevelFunction.setup_context

        @functools.wraps(found)
        def step(*args: Any, **kwargs: Any) -> Any:
            applied = split or (bool(args) and isinstance(args[0], plain(cls, "_backward_cls")))
            leaves = pytree.tree_leaves((args, kwargs)) if applied else ()
            if not any(isinstance(leaf, fx.Proxy) for leaf in leaves):
                return found(*args, **kwargs)
            if name == "setup_context":
                return None
            return tracer.create_proxy("call_function", apply_of(cls), args[not split :], kwargs)

        return step if name == "forward" or split else found

    meta: Any = type(Function)
    meta.__getattribute__ = lookup
    try:
        yield
    finally:
        del meta.__getattribute__
