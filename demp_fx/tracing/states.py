"""What modules keep from call to call: whether a call has changed anything of it."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from demp_fx.tracing.augmented import is_view, is_write
from demp_fx.tracing.preserve import NUMBERS

_MANY = {dict, OrderedDict, list, set, tuple}
_OTHERS = _MANY | NUMBERS

Kept = tuple[Any, Tensor | None]  # a thing, and what it holds if it is a tensor


def held(modules: Iterable[nn.Module], weights: Iterable[Tensor]) -> list[Kept]:
    """All that these modules hold but for `weights`: buffers, attributes and what is in containers
    of them, tensors with a copy. Running statistics, which narrow with the channels, are left to
    the layers that keep them: what they take in is compared as a result."""
    norms: Any = nn.modules.batchnorm._NormBase
    constant = set(map(id, weights))
    found = (one for m in modules if not isinstance(m, norms) for one in _within(vars(m)))
    return [(one, _copy(one)) for one in found if id(one) not in constant]


def kept_memory(root: nn.Module) -> set[Any]:
    """The memory of all tensors that modules hold, also in containers."""
    found = (one for module in root.modules() for one in _within(vars(module)))
    return {memory_of(one) for one in found if issubclass(type(one), Tensor)}


def changed(before: list[Kept], modules: Iterable[nn.Module], weights: Iterable[Tensor]) -> bool:
    """Whether they hold anything else by now."""
    now = held(modules, weights)
    return len(before) != len(now) or any(
        not _alike(one, other) for one, other in zip(before, now, strict=True)
    )


def attributes(root: nn.Module) -> dict[str, Kept]:
    """The tensors that modules have as plain attributes, by name, and copies of them. (Where their
    class has one of this name, too, no buffer could be called so.)"""
    return {
        f"{path}.{name}".lstrip("."): (value, _copy(value))
        for path, module in root.named_modules()
        for name, value in vars(module).items()
        if (kind := type(value)) not in _OTHERS and issubclass(kind, Tensor)
        and not hasattr(type(module), name)
    }  # fmt: skip


def changed_attributes(before: dict[str, Kept], root: nn.Module) -> set[str]:
    """The names of those that hold other numbers by now, or are gone."""
    now = attributes(root)
    return {n for n, was in before.items() if n not in now or not _alike(was, now[n])}


def written_attributes(graph: fx.Graph, root: nn.Module, names: Iterable[str]) -> set[str]:
    """The names of those that nodes of a graph write to, or to parts of them."""
    memory = {memory_of(operator.attrgetter(name)(root)): name for name in names}
    written = [
        operator.attrgetter(str(n.target))(root)
        for n in graph.nodes
        if n.op == "get_attr" and is_written(n)
    ]
    return {memory[at] for at in map(memory_of, written) if at in memory}


def written_among(graph: fx.Graph, names: Collection[str]) -> str:
    """The first of these attributes that nodes of a graph write to, or ""."""
    nodes = graph.find_nodes(op="get_attr")
    return next((str(n.target) for n in nodes if n.target in names and is_written(n)), "")


def is_written(node: fx.Node) -> bool:
    """Whether others write to what a node gives, or to a part of it."""
    return any(
        (user.args[:1] == (node,) and is_write(user))
        or user.kwargs.get("out") is node
        or (is_view(user) and is_written(user))
        for user in node.users
    )


def memory_of(tensor: Any) -> Any:
    """What is the same of tensors that share their memory."""
    strided = isinstance(tensor, Tensor) and tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if strided else tensor


def as_buffers(root: nn.Module, names: Iterable[str]) -> None:
    """Make buffers of attributes."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = root.get_submodule(path)
        module._buffers[attribute] = vars(module).pop(attribute)


def _within(value: Any) -> Iterator[Any]:
    if type(value) in _MANY:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _within(item)
    else:
        yield value


def _copy(value: Any) -> Tensor | None:
    strided = isinstance(value, Tensor) and value.layout is torch.strided
    return value.detach().clone() if strided else None


def _alike(before: Kept, now: Kept) -> bool:
    (value, one), (other, two) = before, now
    if one is None or two is None:
        return value is other
    same = (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device)
    return same and (one.is_meta or torch.equal(one, two))
