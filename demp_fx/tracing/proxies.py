"""The proxies of a graph's values, of which Python may ask what is known of those."""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from demp_fx.errors import TraceError
from demp_fx.tracing.augmented import IN_PLACE, noted
from demp_fx.tracing.source import user_line
from demp_fx.tracing.values import UNKNOWN

_UNPACK, _EXTENDED = dis.opmap["UNPACK_SEQUENCE"], dis.opmap["EXTENDED_ARG"]
# How many dims a tensor has is a plain number, for code that looks things up by it.
RANK = {"ndim", "dim", "ndimension"}


class _Known:
    """Sizes known from the example inputs may steer Python; assignment to items is recorded."""

    tracer: Any
    __array_priority__ = Tensor.__array_priority__  # numpy's numbers let it do the arithmetic

    def known(self) -> Any:
        """Its value, or `UNKNOWN`; asking leaves no trace."""
        return self.tracer.values.of(self)

    def __array__(self, *dtype: Any, **_copy: Any) -> Any:
        return np.asarray(self.tracer.decided(self), *dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a protocol of somebody's own, such as numpy's
            raise AttributeError(name)
        if name in RANK and isinstance(value := self.known(), Tensor):
            return getattr(value, name)
        return self.tracer.lend(KnownAttribute(self, name))  # type: ignore[arg-type]

    @property
    def data(self) -> Any:
        return self.tracer.lend(KnownAttribute(self, "data"))  # type: ignore[arg-type]

    @data.setter
    def data(self, value: Any) -> None:
        """`weight.data = weight.data * mask`: whoever reads the weight afterwards gets that."""
        check_exchanged(self.known(), self.tracer.values.of(value))
        self.data.copy_(value)

    def __len__(self) -> int:
        return int(self.tracer.length(self))

    def __iter__(self) -> Iterator[Any]:
        """As many items as the caller unpacks, in `a, b = proxy`, or else as many as there are.
        torch.fx finds this out by disassembling all of the caller."""
        frame = sys._getframe(1)
        code, place = frame.f_code.co_code, frame.f_lasti
        if code[place] != _UNPACK:
            items: Iterator[Any] = self.tracer.iter(self)
            return items
        count = code[place + 1]
        if code[place - 2] == _EXTENDED:
            count += code[place - 1] << 8
        return (self[i] for i in range(count))  # type: ignore[index]

    def __index__(self) -> int:
        return operator.index(self.tracer.decided(self))

    def __int__(self) -> int:
        return int(self.tracer.decided(self))

    def __float__(self) -> float:
        return float(self.tracer.decided(self))

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


for _op, _in_place in IN_PLACE.items():
    setattr(_Known, f"__{_in_place.__name__}__", noted(_op))


def check_exchanged(old: Any, new: Any) -> None:
    """Refuse data of another form in place of a tensor's, also to torch.export, which in older
    releases of torch forgets it."""
    tensors = isinstance(old, Tensor) and isinstance(new, Tensor)
    if not tensors or (old.shape, old.dtype) != (new.shape, new.dtype):
        where = user_line(sys._getframe())
        raise TraceError(f"{where}: the data of a tensor is exchanged for data of another form")


class KnownProxy(_Known, fx.Proxy):
    """The proxy of a node."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`x() if callable(x) else x`: any proxy can be called, not all that they stand for."""
        value = UNKNOWN if args or kwargs else self.tracer.values.of(self)
        plain = isinstance(value, (Tensor, bool, int, float))
        return self if plain else fx.Proxy.__call__(self, *args, **kwargs)


class KnownAttribute(_Known, Attribute):
    """The proxy of an attribute of a proxy; a node only where it is not called as a method."""

    def known(self) -> Any:
        return getattr(self.root.known(), self.attr, UNKNOWN)


class TensorProxy(KnownProxy):
    """A parameter or buffer; its sizes are plain numbers."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.shape, self.ndim = tensor.shape, tensor.ndim
        self.size, self.dim, self.numel = tensor.size, tensor.dim, tensor.numel


class Flag(KnownProxy):
    """`module.training`: a node of its own from its first use on."""

    def __init__(self, tracer: fx.Tracer, target: str) -> None:
        self.tracer, self.target = tracer, target
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None or self._node._erased:
            self._node = self.tracer.create_node("get_attr", self.target, (), {})
        return self._node
