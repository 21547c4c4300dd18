"""Numbers that are worked out of sizes of the input: what is merged with the batch, say, is as long
as the example's only in the example."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from demp_fx.calls import ASKS, called


@dataclass(frozen=True)
class InputSizes:
    """`env`: the example value of each node. `channels`: the dims of a node's value that have
    channels, and so are as long for any input."""

    env: Mapping[fx.Node, Any]
    channels: Callable[[fx.Node], set[int]]
    _found: dict[fx.Node, bool] = field(default_factory=dict)

    def varies(self, node: fx.Node) -> bool:
        """Whether a size of the input is in the number, or the sizes, that a node holds."""
        if node not in self._found:
            self._found[node] = self._look(node)
        return self._found[node]

    def _look(self, node: fx.Node) -> bool:
        source, place = (*node.args, None, None)[:2]
        index = place if isinstance(place, int) else None
        if called(node) in ASKS:
            return self._varies_at(source, index)
        asked = source if isinstance(source, fx.Node) and called(source) in ASKS else None
        if node.target is operator.getitem and asked is not None and index is not None:
            return self._varies_at(asked.args[0], index)
        return any(  # numbers out of a tensor are anybody's guess
            isinstance(self.env.get(n), Tensor) or self.varies(n) for n in node.all_input_nodes
        )

    def _varies_at(self, source: Any, dim: int | None) -> bool:
        value = self.env.get(source)
        if not isinstance(value, Tensor) or source.op == "get_attr":
            return False
        dims = range(value.dim()) if dim is None else (dim % value.dim(),)
        return not set(dims) <= self.channels(source)


def at_larger(env: Mapping[fx.Node, Any], given: Any, more: int) -> Any:
    """What would be `given`, nodes and numbers, if all sizes that the code asks for were larger."""

    def found(node: fx.Node) -> Any:
        value = env[node]
        if isinstance(value, Tensor) or not node.all_input_nodes:
            return value
        if called(node) in ASKS:
            sizes = [n + more for n in (value if isinstance(value, tuple) else (value,))]
            return torch.Size(sizes) if isinstance(value, tuple) else sizes[0]
        args, kwargs = map_arg((node.args, node.kwargs), found)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        run: Any = node.target
        return run(*args, **kwargs)

    return map_arg(given, found)
