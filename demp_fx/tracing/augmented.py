"""`x += y` in a model's code, which torch.fx would take for `x = x + y`.

That is the same wherever nobody reads what `x` was under another name: as most code does, and as it
is written then. Else (`row = x[0]; row += 1`, or `same = x; x += 1`) it stays in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from demp_fx.calls import called

IN_PLACE: dict[Any, Any] = {
    getattr(operator, name): getattr(operator, f"i{name.rstrip('_')}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
}
# What gives a part of a tensor, all of it or all of its parts, and no copy of it.
MOVES = (
    "view", "view_as", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "swapdims",
    "movedim", "permute", "squeeze", "unsqueeze", "narrow", "select", "diagonal", "detach", "t",
    "expand", "chunk", "split", "tensor_split", "unbind",
)  # fmt: skip
_VIEWS = {operator.getitem, *MOVES, *(f for name in MOVES if (f := getattr(torch, name, None)))}
_TURNED = {"T", "mT", "data"}
_SIZES = {"size", "dim", "numel"}
_FEATURES = {"shape", "dtype", "device", "ndim"}


def is_write(node: fx.Node) -> bool:
    """Whether what a node calls writes to its first argument."""
    return writes(node.op, node.target)


def writes(kind: str, target: Any) -> bool:
    """The same of a call, before there is a node of it."""
    name = target if kind == "call_method" else ""
    method = str(name).endswith("_") and not str(name).endswith("__")
    return method or target is operator.setitem or target in IN_PLACE.values()


def is_view(node: fx.Node) -> bool:
    """Whether what a node gives has the memory of its first argument."""
    return called(node) in _VIEWS or (node.target is getattr and node.args[1] in _TURNED)


def noted(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The augmented assignment of a proxy by `op`: its tracer notes the node."""

    def assign(self: Any, other: Any) -> Any:
        result = op(self, other)
        if isinstance(result, fx.Proxy):
            self.tracer.augmented.append(result.node)
        return result

    return assign


def keep_in_place(
    graph: fx.Graph, noted: Collection[fx.Node], value_of: Callable[[fx.Node], Any]
) -> None:
    """Let those of the `noted` nodes that others see the effect of write in place."""
    places = {node: k for k, node in enumerate(graph.nodes)} if noted else {}
    assigned = set(noted)
    for node in noted:
        if node in places and node.target in IN_PLACE and _is_seen(node, places, assigned):
            assert isinstance(node.args[0], fx.Node)
            if isinstance(value_of(node.args[0]), Tensor):
                node.target = IN_PLACE[node.target]


def _is_seen(node: fx.Node, places: dict[fx.Node, int], noted: set[fx.Node]) -> bool:
    """Whether what `node` would write to is read later, or is a part of what is; what a `noted` one
    gives has the memory of what it was given."""
    held: Any = node.args[0]
    while isinstance(held, fx.Node):
        if _is_read(held, places[node], places):
            return True
        if not is_view(held) and held not in noted:
            return False
        held = held.args[0]
        if isinstance(held, fx.Node) and held.op == "get_attr":  # the next call reads it
            return True
    return False


def _is_read(node: fx.Node, after: int, places: dict[fx.Node, int]) -> bool:
    """Whether what a node gives, or a part of it that was taken before, is read after a place."""
    for user in node.users:
        if places[user] > after and not _asks_sizes(user):
            return True
        if places[user] < after and is_view(user) and _is_read(user, after, places):
            return True
    return False


def _asks_sizes(node: fx.Node) -> bool:
    return called(node) in _SIZES or (node.target is getattr and node.args[1] in _FEATURES)
