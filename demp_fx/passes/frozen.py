"""Numbers computed of sizes as they were: `x / (c * h * w)` where c has become smaller."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from demp_fx.calls import COUNTS, called

# By the node that asks for sizes: for each dim the old and the new one, None where it stays.
Changes = Mapping[str, Sequence[tuple[int, int] | None]]
Make = Callable[[str, Any, Any, Any], Any]  # (op, target, args, kwargs) -> what stands for the node


def restored(
    node: fx.Node, changes: Changes, make: Make, untouched: Callable[[fx.Node], Any]
) -> Any:
    """The value of `node` with the old sizes in it: a number, or what `make` makes where other
    sizes are in it; `untouched` gives what stands for nodes without any that changed."""
    known: dict[fx.Node, Any] = {}

    def value(n: fx.Node) -> Any:
        if n not in known:
            known[n] = find(n)
        return known[n]

    def find(n: fx.Node) -> Any:
        if n.name in changes:
            return _asked(n, changes[n.name], make, untouched(n))
        args, kwargs = map_arg((n.args, n.kwargs), value)
        if not any(known[i] is not untouched(i) for i in n.all_input_nodes):
            return untouched(n)
        if n.target is operator.getitem and isinstance(args[0], tuple):
            index: Any = args[1]
            return args[0][index]
        if called(n) in COUNTS and isinstance(args[0], tuple):
            return _product(args[0], make)
        if n.op == "call_function" and not _holds_nodes((args, kwargs)):
            return n.target(*args, **kwargs)  # type: ignore[operator]
        return make(n.op, n.target, args, kwargs)

    return value(node)


def _asked(node: fx.Node, sizes: Sequence[tuple[int, int] | None], make: Make, narrow: Any) -> Any:
    """What a node that asks for sizes gave before; `narrow`: what gives the new ones."""
    if called(node) in COUNTS:
        for old, new in filter(None, sizes):
            part = make("call_function", operator.floordiv, (narrow, new), {})
            narrow = make("call_function", operator.mul, (part, old), {})
        return narrow
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(dim, int):
        before = sizes[dim]
        assert before is not None
        return before[0]
    return tuple(
        make("call_function", operator.getitem, (narrow, d), {}) if size is None else size[0]
        for d, size in enumerate(sizes)
    )


def _product(sizes: tuple[Any, ...], make: Make) -> Any:
    """Of numbers, and of what stands for others."""
    result: Any = math.prod(size for size in sizes if isinstance(size, int))
    for size in sizes:
        if not isinstance(size, int):
            result = make("call_function", operator.mul, (size, result), {})
    return result


def _holds_nodes(arguments: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(arguments, found.append)
    return bool(found)
