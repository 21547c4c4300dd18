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
    before = [(m, dict(vars(m)), _contents(m), _numbers(m)) for m in modules]
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


def _numbers(module: nn.Module) -> list[tuple[Tensor, Tensor, int]]:
    """Tensors that are no buffers, copies of them, and how often they have been written into."""
    tensors = [v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_inference()]
    return [(t, t.detach().clone(), t._version) for t in tensors]


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Containers and copies of them; an empty one stands for its copy, which it is once cleared."""
    return [(v, v and v.copy()) for v in vars(module).values() if type(v) in _CONTAINERS]
