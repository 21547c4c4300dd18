"""Tracing runs a model's own code: whatever it keeps in its modules is put back afterwards."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

CONSTANT = "_tensor_constant"  # how fx names tensors that it keeps on the root
_CONTAINERS = {dict, OrderedDict, list, set}


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
                if tensor._version != version:
                    tensor.detach().copy_(held)
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


def _held(
    module: nn.Module,
) -> tuple[list[tuple[Any, Any]], list[tuple[Tensor, Tensor, int]]]:
    """Containers and copies of them (an empty one stands for its copy, which it is once cleared);
    tensors that are no buffers, copies of them, and how often they have been written into."""
    containers: list[tuple[Any, Any]] = []
    tensors: list[tuple[Tensor, Tensor, int]] = []
    for value in vars(module).values():
        kind = type(value)  # by kind, as this is asked very often
        if kind in _CONTAINERS:
            containers.append((value, value and value.copy()))
        elif issubclass(kind, Tensor) and not value.is_inference():
            tensors.append((value, value.detach().clone(), value._version))
    return containers, tensors
