"""Sizes used as numbers: `head_dim ** -0.5` must not change because `head_dim` did."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from demp_fx.calls import ASKS, COUNTS, called
from demp_fx.passes.frozen import restored
from demp_fx.passes.plan import Frozen, Literal
from demp_fx.passes.resize import SIZED
from demp_fx.passes.sizes import MisfitError, Sizes


def narrower_sizes(graph: fx.GraphModule, sizes: Sizes) -> set[fx.Node]:
    """Nodes that hold a size that gets smaller, or a number or list computed from one."""
    changed: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if called(node) in ASKS | COUNTS and node.args and sizes.masks(node.args[0]):
            found = _asks(node, sizes)
        elif not changed or not any(n in changed for n in node.all_input_nodes):
            continue
        elif node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            found = _picks(node.args[0], node.args[1], sizes)
        else:
            value = sizes.env.get(node)
            found = isinstance(value, (int, float)) and not isinstance(value, bool)
        if found:
            changed.add(node)
    return changed


def frozen_scalars(graph: fx.GraphModule, sizes: Sizes) -> list[Literal | Frozen]:
    """Every number computed from a size that gets smaller, where it is used by a tensor op and not
    as a size: its old value, or how it is to be computed where other sizes are in it."""
    found: list[Literal | Frozen] = []
    for node in graph.graph.nodes if sizes.changed else ():
        tainted = [n for n in node.all_input_nodes if n in sizes.changed]
        asks = called(node) in ASKS or node.target is operator.getitem
        if tainted and isinstance(sizes.env.get(node), Tensor) and called(node) not in SIZED:
            found += [] if asks else _numbers(node, tainted, sizes)
    return found


def _asks(node: fx.Node, sizes: Sizes) -> bool:
    """Whether `x.shape`, `x.size()` or `x.size(d)` includes a size that changes."""
    source: Any = node.args[0]
    if called(node) in COUNTS:
        return True
    if node.target is not getattr and (len(node.args) > 1 or "dim" in node.kwargs):
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
        return dim % sizes.env[source].dim() in sizes.masks(source)
    return node.target == "size" or node.args[1] == "shape"


def _picks(source: fx.Node, index: Any, sizes: Sizes) -> bool:
    """Whether `shape[index]`, or `shape[2:][index]`, is or holds a size that changes."""
    asked = _dims(source, sizes)
    if asked is None or not isinstance(index, (int, slice)):
        return True
    tensor, dims = asked
    picked = dims[index]
    masks = sizes.masks(tensor)
    return any(d in masks for d in ([picked] if isinstance(picked, int) else picked))


def _dims(node: fx.Node, sizes: Sizes) -> tuple[fx.Node, list[int]] | None:
    """Of which tensor, and of which of its dims, a list of sizes is; None where that is unknown."""
    if called(node) in ASKS and isinstance(node.args[0], fx.Node):
        value = sizes.env.get(node.args[0])
        return (node.args[0], list(range(value.dim()))) if isinstance(value, Tensor) else None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        asked, index = _dims(node.args[0], sizes), node.args[1]
        if asked is not None and isinstance(index, slice):
            ends = (index.start, index.stop, index.step)
            if not any(isinstance(end, fx.Node) for end in ends):
                return asked[0], asked[1][index]
    return None


def _numbers(node: fx.Node, tainted: list[fx.Node], sizes: Sizes) -> Iterator[Literal | Frozen]:
    for where, arguments in (("args", enumerate(node.args)), ("kwargs", node.kwargs.items())):
        for key, argument in arguments:
            if not (isinstance(argument, fx.Node) and argument in tainted):
                continue
            if not isinstance(sizes.env[argument], (int, float)):
                continue
            changes = _changes(argument, sizes)
            found = restored(argument, changes, lambda *_: node, lambda n: n)
            if not isinstance(found, fx.Node) and sizes.varies(argument):
                raise MisfitError(node)  # the old number is that of the example's input alone
            if isinstance(found, fx.Node):
                yield Frozen(node=node.name, path=[where, key], sizes=changes)
            else:
                yield Literal(node=node.name, path=[where, key], value=found)


def _changes(node: fx.Node, sizes: Sizes) -> dict[str, list[tuple[int, int] | None]]:
    """The nodes that ask for sizes that change, on the way to a number."""
    found: dict[str, list[tuple[int, int] | None]] = {}
    waiting = [node]
    for n in waiting:
        source: Any = n.args[0] if n.args else None
        of_a_tensor = called(n) in ASKS | COUNTS and isinstance(sizes.env.get(source), Tensor)
        if n in sizes.changed and of_a_tensor and _asks(n, sizes):
            new = sizes.new(source)
            found[n.name] = [
                (size, new[d]) if d in new else None
                for d, size in enumerate(sizes.env[source].shape)
            ]
        elif n in sizes.changed:
            waiting += [i for i in n.all_input_nodes if i not in waiting]
    return found
