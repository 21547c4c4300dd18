"""What a forward writes to attributes of its modules: averages in buffers, caches, losses."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.fx.proxy import Attribute

from demp_fx.tracing.functions import proxy_in
from demp_fx.tracing.proxies import Flag, check_exchanged
from demp_fx.tracing.source import quoted
from demp_fx.tracing.written import Written

if TYPE_CHECKING:
    from demp_fx.tracing.tracer import Tracer


@contextmanager
def items_as_nodes(tracer: Tracer) -> Iterator[None]:
    """Meanwhile items of a tensor are nodes where a proxy is the index, or is assigned to them, or
    to its data: caches and tables need not be buffers."""
    kind: Any = Tensor
    get, put, data = kind.__getitem__, kind.__setitem__, kind.data

    def records(tensor: Tensor, given: tuple[Any, ...]) -> bool:
        if tracer.values.busy:
            return False
        return isinstance(tensor, Written) or proxy_in(given) is not None

    def getitem(self: Tensor, index: Any) -> Any:
        if records(self, (index,)):
            return tracer.create_proxy("call_function", operator.getitem, (self, index), {})
        return get(self, index)

    def setitem(self: Tensor, index: Any, value: Any) -> None:
        if records(self, (index, value)):
            tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})
        else:
            put(self, index, value)

    def exchange(self: Tensor, value: Any) -> None:
        if records(self, (value,)):
            check_exchanged(self, tracer.values.of(value))
            tracer.create_proxy("call_method", "copy_", (self, value), {})
        else:
            data.__set__(self, value)

    kind.__getitem__, kind.__setitem__ = getitem, setitem
    kind.data = property(data.__get__, exchange)
    try:
        yield
    finally:
        del kind.__getitem__, kind.__setitem__, kind.data


def keep_assigned(tracer: Tracer) -> None:
    """At the end of a forward: write to the buffers that it has assigned, and note what else."""
    for module, flag in tracer.flags.items():
        prefix = flag.target.removesuffix("training")
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if issubclass(type(value), fx.Proxy) and _is_in_graph(value):
                _keep(tracer, prefix + name, value)


def _keep(tracer: Tracer, name: str, value: Any) -> None:
    old, new = tracer.state.get(name), tracer.values.of(value)
    if value.node.op == "get_attr" and tracer.state.get(value.node.target) is old:
        return  # it is the same that it was
    read = tracer.tensor_proxies.get(name)
    kept = name not in tracer.states or (read is not None and read.node.users)
    if kept and all(isinstance(t, Tensor) for t in (old, new)) and _form(old) == _form(new):
        tracer.create_proxy("get_attr", name, (), {}).copy_(value.detach())
    else:
        line = quoted(value.node.meta["source"])
        tracer.baked[f"{line} computes `{name}`, which the result does not keep"] = None


def _form(tensor: Any) -> Any:
    return tensor.shape, tensor.dtype


def _is_in_graph(value: fx.Proxy) -> bool:
    """Whether it is the proxy of a node: not of a mode, of a size that nothing has asked for, or
    one of an attempt that was rolled back."""
    if isinstance(value, Flag):
        return False
    node = value._node if isinstance(value, Attribute) else value.node
    return node is not None and not node._erased
