"""What of torch is replaced while a model is traced.

Autograd functions become one node each, so that their own backward stays; and a subclass of a batch
norm that calls its base's forward gets one that does not branch on `training`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from demp_fx.expressions import batch_norm


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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Apply) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return Apply, (self.function,)


@contextmanager
def as_nodes(tracer: fx.Tracer) -> Iterator[None]:
    """Meanwhile `Function.apply` of a proxy is a node that calls it.

    Left alone it would run the forward on proxies, and the graph's gradient would be that of the
    forward. What is replaced is what every `apply` ends in, however early it was looked up. Torch's
    own functions (checkpointing, hooks) run through: their gradient is that of their forward.
    """

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        proxies = any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs)))
        if proxies and not cls.__module__.startswith("torch."):
            return tracer.create_proxy("call_function", Apply(cls), args, kwargs)
        return super(_SingleLevelFunction, cls).apply(*args, **kwargs)

    base: Any = _SingleLevelFunction
    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply


@contextmanager
def batch_norms_in_parts() -> Iterator[None]:
    """Meanwhile `super().forward(x)` in a subclass of a batch norm follows train() and eval()."""
    whole = _BatchNorm.forward

    def forward(self: Any, input: Any) -> Any:
        traced = isinstance(input, fx.Proxy)
        return batch_norm(self, input) if traced else whole(self, input)

    kinds: Any = _BatchNorm
    kinds.forward = forward
    try:
        yield
    finally:
        kinds.forward = whole
