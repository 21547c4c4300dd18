"""`torch.vmap` of proxies: a function of single numbers is called once, on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from demp_fx.tracing.functions import proxy_in

if TYPE_CHECKING:
    from demp_fx.tracing.tracer import Tracer

# What gives for each of many numbers what it gives for one, by name.
_OF_EACH = {
    "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "abs", "invert", "and_", "or_", "xor",
    "lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_xor", "logical_not",
    "where", "minimum", "maximum", "clamp", "to", "bool", "int", "long", "float", "double",
}  # fmt: skip
_NEW = {"new_ones", "new_zeros"}


class _Mapped:
    """A function that `torch.vmap` maps: by itself, if no argument is a proxy."""

    def __init__(self, tracer: Tracer, function: Any, dims: Any, out: Any, whole: Any) -> None:
        self.tracer, self.function, self.dims, self.out = tracer, function, dims, out
        self.whole = whole

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = None if kwargs or proxy_in(args) is None else self._at_once(args)
        return self.whole(*args, **kwargs) if found is None else found

    def _at_once(self, args: tuple[Any, ...]) -> Any:
        """The result for vectors each of which is mapped over once, by this or a function that it
        maps: each gets an axis of its own. None where there is more to it."""
        axes: dict[int, int] = {}
        inner, depth = self, 0
        while isinstance(inner, _Mapped):
            dims = inner.dims if isinstance(inner.dims, tuple) else (inner.dims,) * len(args)
            mapped = [k for k, d in enumerate(dims) if d is not None]
            if inner.out != 0 or any(dims[k] != 0 or k in axes for k in mapped):
                return None
            axes |= dict.fromkeys(mapped, depth)
            inner, depth = inner.function, depth + 1
        if not all(isinstance(args[k], fx.Proxy) and self._rank(args[k].node) == 1 for k in axes):
            return None
        mark, sizes, spread = len(self.tracer.graph.nodes), [1] * depth, list(args)
        for k, axis in axes.items():
            sizes[axis] = args[k].shape[0]
            spread[k] = args[k].reshape([-1 if d == axis else 1 for d in range(depth)])
        many, first = {spread[k].node for k in axes}, len(self.tracer.graph.nodes)
        result: Any = inner(*spread)
        if isinstance(result, fx.Proxy) and self._is_of_each(many, first):
            return result.expand(sizes)
        self.tracer._roll_back(mark)
        return None

    def _is_of_each(self, many: set[fx.Node], first: int) -> bool:
        """Whether all that nodes do, from the `first` one on, to what holds `many` numbers, is done
        to each number by itself."""
        for node in list(self.tracer.graph.nodes)[first:]:
            sources = node.all_input_nodes
            if many.isdisjoint(sources):
                continue
            name = getattr(node.target, "__name__", node.target)
            if name == "getitem":
                table, index = node.args
                places = index if isinstance(index, tuple) else (index,)
                whole = table not in many and self._rank(table) == len(places)
                fits = whole and all(isinstance(i, fx.Node) and i != table for i in places)
                sources = [n for n in sources if n is not table]
            elif name == "getattr":
                fits = node.args[1] in ("device", "dtype")
            else:
                fits = name in _OF_EACH or (name in _NEW and node.args[1:2] == ((),))
            if not fits or any(n not in many and self._rank(n) for n in sources):
                return False
            if isinstance(self.tracer.values.of_node(node), Tensor):
                many.add(node)
        return True

    def _rank(self, node: Any) -> int:
        """How many axes what a node gives has; none, if it is no tensor."""
        value = self.tracer.values.of_node(node)
        return value.dim() if isinstance(value, Tensor) else 0


@contextmanager
def vmap_of_proxies(tracer: Tracer) -> Iterator[None]:
    """Meanwhile functions of single numbers, such as those that say which token attends to which,
    are mapped over proxies."""
    whole = torch.vmap

    def vmap(
        func: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, *more: Any, **named: Any
    ) -> _Mapped:
        mapped = whole(func, in_dims, out_dims, *more, **named)
        return _Mapped(tracer, func, in_dims, out_dims, mapped)

    homes: Any = (torch, torch.func)
    for home in homes:
        home.vmap = vmap
    try:
        yield
    finally:
        for home in homes:
            home.vmap = whole
