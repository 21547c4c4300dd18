"""Tensors that code makes of numbers of its own, and then writes something into that is traced:
`total = torch.zeros(8); total += x.mean(0)`. From then on they are values of the graph, which
makes them anew at each call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.overrides import is_tensor_method_or_property
from torch.utils import _pytree as pytree


class Written(Tensor):
    """Such a tensor, which the code still holds: whatever it does with it is done to `proxy`."""

    proxy: fx.Proxy

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(Written, lambda t: t.proxy, (args, kwargs or {}))
        if not args or not isinstance(args[0], fx.Proxy) or not is_tensor_method_or_property(func):
            return func(*args, **kwargs)
        if func.__name__ == "__get__":
            return getattr(args[0], func.__self__.__name__)
        return getattr(args[0], func.__name__)(*args[1:], **kwargs)


def as_written(tensor: Tensor, tracer: fx.Tracer) -> Written:
    """`tensor` itself, which is a `Written` from now on."""
    if tensor.grad_fn is not None or tensor._base is not None:
        raise TypeError("what the code has made is written into, and may be read in another way")
    numbers = tensor.detach().clone()
    proxy = tracer.create_proxy("call_method", "clone", (numbers,), {})
    tensor.__class__ = Written
    assert isinstance(tensor, Written)
    tensor.proxy = proxy
    return tensor


def give_back(tensors: list[Written]) -> None:
    """What the code keeps of them are plain tensors again."""
    for tensor in tensors:
        del tensor.proxy
        tensor.__class__ = Tensor  # type: ignore[assignment]
