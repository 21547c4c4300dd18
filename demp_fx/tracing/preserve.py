"""Tracing runs a model's own code: whatever it keeps in its modules is put back afterwards."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

CONSTANT = "_tensor_constant"  # how fx names tensors that it keeps on the root
NUMBERS = {bool, int, float, str, type(None)}  # kinds of attributes that hold nothing else
_CONTAINERS = {dict, OrderedDict, list, set}
TABLES = {"_parameters", "_buffers", "_modules"}


@contextlib.contextmanager
def preserved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back the attributes of these modules, and what dicts, lists, sets and tensors among them
    held: a forward may fill a cache there, which would hold proxies from now on. Constants of fx
    stay."""
    before = [(m, dict(vars(m)), *_held(m)) for m in modules]
    try:
        yield
    finally:
        for module, attributes, contents, numbers in before:
            for tensor, held, version in numbers:
                _put_back(tensor, held, version)
            table = vars(module)
            new = [(k, table[k]) for k in table if k not in attributes and CONSTANT in k]
            table.clear()
            table.update(attributes)
            table.update(new)
            for container, content in contents:
                if not container and not content:  # nearly all of them
                    continue
                container.clear()
                if isinstance(container, list):
                    container.extend(content)
                else:
                    container.update(content)


def _put_back(tensor: Tensor, held: tuple[Tensor, Tensor], version: int) -> None:
    """The numbers that a tensor held, in the memory that it had: code may write to its `data`, or
    exchange that, and its version then stays the same."""
    data, copy = held
    if tensor.device != data.device or not tensor.is_set_to(data):
        tensor.data = data
    if tensor._version != version or not torch.equal(tensor, copy):
        tensor.detach().copy_(copy)


def _held(
    module: nn.Module,
) -> tuple[list[tuple[Any, Any]], list[tuple[Tensor, tuple[Tensor, Tensor], int]]]:
    """Containers and copies of them (an empty one stands for its copy, which it is once cleared);
    tensors that are no buffers, also those in containers, what they hold, and how often they have
    been written into."""
    containers: list[tuple[Any, Any]] = []
    tensors: list[tuple[Tensor, tuple[Tensor, Tensor], int]] = []
    for name, value in vars(module).items():  # by kind, as this is asked very often
        inner: Iterable[Any] = (value,)
        kind = type(value)
        if kind in NUMBERS:
            continue
        if kind in _CONTAINERS:
            containers.append((value, value and value.copy()))
            if not value or name in TABLES:
                continue
            inner = value.values() if isinstance(value, dict) else value
        for one in inner:
            kind = type(one)
            if issubclass(kind, Tensor) and kind is not nn.Parameter and _is_plain(one):
                tensors.append((one, (one.data, one.detach().clone()), one._version))
    return containers, tensors


def _is_plain(tensor: Tensor) -> bool:
    return not (tensor.is_inference() or tensor.is_meta) and tensor.layout is torch.strided
