"""Tracing runs a model's own code: whatever it keeps in its modules is put back afterwards."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

CONSTANT = "_tensor_constant"  # how fx names tensors that it keeps on the root
_CONTAINERS = {dict, OrderedDict, list, set}


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back the attributes of all modules, and what dicts, lists and sets among them held: a
    forward may fill a cache there, which would hold proxies from now on. Constants of fx stay."""
    before = [(m, dict(vars(m)), _contents(m)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
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


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Containers and copies of them; an empty one stands for its copy, which it is once cleared."""
    return [(v, v and v.copy()) for v in vars(module).values() if type(v) in _CONTAINERS]
