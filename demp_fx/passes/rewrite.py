"""The graph around what gets narrower: sizes in code, gathers, sums, spreads, as the plan says."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

from demp_fx.calls import ASKS, COUNTS, called
from demp_fx.passes.count import recount
from demp_fx.passes.frozen import restored
from demp_fx.passes.plan import (
    Frozen,
    Gather,
    Literal,
    PruningPlan,
    Regroup,
    Selection,
    Spread,
    Sum,
)

CHUNK = ("input", "chunks", "dim")  # the arguments of what becomes a split, in order


def rewritten(old: fx.Graph, plan: PruningPlan, constants: Constants) -> fx.Graph:
    """A copy of a graph, changed around what a plan makes narrower."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in old.nodes:
        copies[node] = new.node_copy(node, copies.__getitem__)
    new._codegen = old._codegen
    named = {node.name: copies[node] for node in old.nodes}
    shared: dict[tuple[str, int, tuple[int, ...]], fx.Node] = {}
    given: dict[tuple[str, str], fx.Node] = {}  # what gathers have left, by producer and consumer
    for literal in plan.literals:
        _set(new, named[literal.node], literal)
    for frozen in plan.frozen:
        _freeze(new, frozen, named)
    for selection in plan.selections:
        _select(new, selection, named, constants)
    order = {name: k for k, name in enumerate(named)}
    for gather in sorted(plan.gathers, key=lambda gather: order[gather.consumer]):
        _gather(new, gather, named, constants, shared, given)
    for regroup in plan.regroups:
        _regroup(new, regroup, named, constants, given)
    for spread in plan.spreads:
        producer, consumer = named[spread.producer], named[spread.consumer]
        inputs = consumer.all_input_nodes
        chain = [n for n in inputs if n is producer or producer in n.args]
        left = given.get((spread.producer, spread.consumer)) or chain[0]
        with new.inserting_before(consumer):
            put = _spread(new, left, spread, constants, consumer.name)
        consumer.replace_input_with(left, put)
        given[spread.producer, spread.consumer] = put
    for total in plan.sums:
        _sum(new, total, named, constants)
    layers = dict(constants.module.named_modules(remove_duplicate=False)) if plan.counts else {}
    for count in plan.counts:
        named[count.node] = recount(new, named[count.node], count, layers)
    for selection in plan.selections:
        for name in reversed(selection.path):
            if name in named and not named[name].users:
                new.erase_node(named.pop(name))
    new.lint()
    return new


class Constants:
    """Index lists and shifts: buffers that move with the module and stay out of its state dict."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.parts: dict[str, Tensor] = {}
        floats = (p for p in module.parameters() if p.is_floating_point())
        self.like = next(floats, torch.empty(0))

    def add(
        self, graph: fx.Graph, name: str, values: list[int] | list[float], shape: list[int]
    ) -> fx.Node:
        """Register a constant and return the node that reads it (at the insertion point)."""
        while hasattr(self.module, name) or name in self.parts:
            name += "_"
        whole = isinstance(next(iter(values), 0), int)
        dtype = torch.int64 if whole else self.like.dtype
        made = torch.from_numpy(np.array(values, dtype=np.int64 if whole else np.float64))
        self.parts[name] = made.to(self.like.device, dtype).reshape(shape)
        return graph.get_attr(name)


def _freeze(graph: fx.Graph, frozen: Frozen, named: dict[str, fx.Node]) -> None:
    """Compute a number of the sizes that its tensors had."""
    node = named[frozen.node]
    argument = _at(node, frozen.path)
    sizes = {named[name].name: changes for name, changes in frozen.sizes.items()}
    made: list[fx.Node] = []

    def make(*call: Any) -> fx.Node:
        made.append(graph.create_node(*call))
        return made[-1]

    with graph.inserting_before(node):
        _put(node, frozen.path, restored(argument, sizes, make, lambda n: n))
    for left in (*reversed(made), argument):
        _erase(graph, left)


def _erase(graph: fx.Graph, number: fx.Node) -> None:
    """Erase a number that nobody uses any more, and those that it was computed of."""
    if number._erased or number.users or called(number) in ASKS | COUNTS:
        return
    inputs = number.all_input_nodes
    graph.erase_node(number)
    for n in inputs:
        _erase(graph, n)


def _set(graph: fx.Graph, node: fx.Node, literal: Literal) -> None:
    value: Any = literal.value
    if literal.slice:
        value = slice(*literal.value)  # type: ignore[misc]
    if literal.of is not None:
        with graph.inserting_before(node):
            times = graph.call_function(operator.mul, (_at(node, literal.path), value))
            value = graph.call_function(operator.floordiv, (times, literal.of))
    if literal.target is not None:
        node.target = literal.target if node.op == "call_method" else getattr(torch, literal.target)
        named = [node.kwargs[name] for name in CHUNK if name in node.kwargs]
        node.args = (*node.args, *named)  # the names are others now
        node.kwargs = {name: v for name, v in node.kwargs.items() if name not in CHUNK}
    _put(node, literal.path, value)


def _at(node: fx.Node, place: list[int | str]) -> Any:
    """The argument that stands at a place."""
    where, *path = place
    found: Any = node.args if where == "args" else node.kwargs
    for key in path:
        found = found[key]
    return found


def _put(node: fx.Node, place: list[int | str], value: Any) -> None:
    where, *path = place
    if where == "args":
        node.args = _replaced(node.args, path, value)
    else:
        node.kwargs = _replaced(node.kwargs, path, value)


def _replaced(container: Any, path: list[int | str], value: Any) -> Any:
    """A copy of nested arguments with one entry exchanged."""
    if not path:
        return value
    head, *rest = path
    if isinstance(container, dict) or hasattr(container, "items"):
        return {**container, head: _replaced(container.get(head), rest, value)}
    entries = list(container)
    entries[head] = _replaced(entries[head], rest, value)  # type: ignore[index]
    return tuple(entries) if isinstance(container, tuple) else entries


def _gather(
    graph: fx.Graph, gather: Gather, named: dict[str, fx.Node], constants: Constants,
    shared: dict[tuple[str, int, tuple[int, ...]], fx.Node],
    given: dict[tuple[str, str], fx.Node],
) -> None:  # fmt: skip
    """Before the first who reads it: what is written into the producer until then is in it."""
    consumer = named[gather.consumer]
    source = given.get((gather.producer, gather.consumer), named[gather.producer])
    key = (source.name, gather.dim, tuple(gather.index))
    if key not in shared:
        name = f"{gather.producer}_keep{len(shared)}"
        with graph.inserting_before(consumer):
            shared[key] = _pick(graph, source, gather.dim, gather.index, name, constants)
        shared[key].meta = {k: v for k, v in source.meta.items() if k == "source"}
    consumer.replace_input_with(source, shared[key])
    given[gather.producer, gather.consumer] = shared[key]


def _regroup(
    graph: fx.Graph, regroup: Regroup, named: dict[str, fx.Node], constants: Constants,
    given: dict[tuple[str, str], fx.Node],
) -> None:  # fmt: skip
    """Take the inputs that each filter has left out of a weight that is computed."""
    consumer = named[regroup.consumer]
    weight = given.get((regroup.producer, regroup.consumer), named[regroup.producer])
    index = [row for row in regroup.index for _ in range(regroup.filters)]
    shape = [len(index), len(index[0]), *[1] * (regroup.rank - 2)]
    with graph.inserting_before(consumer):
        flat = [k for row in index for k in row]
        columns = constants.add(graph, f"{consumer.name}_columns", flat, shape)
        left = graph.call_function(torch.take_along_dim, (weight, columns, 1))
    left.meta = {k: v for k, v in weight.meta.items() if k == "source"}
    consumer.replace_input_with(weight, left)


def _pick(
    graph: fx.Graph, source: fx.Node, dim: int, index: list[int], name: str, constants: Constants
) -> fx.Node:
    """Channels of a value, as a view where they are a run (at the insertion point)."""
    first, size = index[0] if index else 0, len(index)
    if index == list(range(first, first + size)):
        return graph.call_function(torch.narrow, (source, dim, first, size))
    numbers = constants.add(graph, name, index, [-1])
    return graph.call_function(torch.index_select, (source, dim, numbers))


def _select(
    graph: fx.Graph, selection: Selection, named: dict[str, fx.Node], constants: Constants
) -> None:
    """One `index_select` in the place of movements; the old ones are erased later, if unused."""
    old = named[selection.node]
    with graph.inserting_before(old):
        new = _pick(graph, named[selection.producer], selection.dim, selection.index,
                    f"{selection.node}_keep", constants)  # fmt: skip
        if selection.places is not None:
            wide = Spread(
                producer="", consumer="", dim=selection.dim, rank=selection.rank,
                size=selection.size, places=selection.places, shift=selection.shift,
            )  # fmt: skip
            new = _spread(graph, new, wide, constants, selection.node)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    named[selection.node] = new
    for name in reversed(selection.path):
        if name == selection.node:
            graph.erase_node(old)


def _sum(graph: fx.Graph, total: Sum, named: dict[str, fx.Node], constants: Constants) -> None:
    """`left + right` where one or both have fewer channels: scatter the narrow one into the other.

    Where neither has all, the wider one is spread out first.
    """
    node = named[total.node]
    left: Any = node.args[0]
    right: Any = node.args[1]
    base, base_at, other, other_at = left, total.left, right, total.right
    if base_at is not None and (other_at is None or len(other_at) > len(base_at)):
        base, base_at, other, other_at = right, total.right, left, total.left
    with graph.inserting_before(node):
        if base_at is not None:
            wide = Spread(producer="", consumer=total.node, dim=total.dim, rank=total.rank,
                          size=total.size, places=base_at, shift=total.shift)  # fmt: skip
            base = _spread(graph, base, wide, constants, total.node)
        elif total.shift is not None:
            shape = [1] * total.rank
            shape[total.dim] = -1
            shift = constants.add(graph, f"{total.node}_shift", total.shift, shape)
            base = _shifted(graph, base, shift)
        if other_at is None:
            result = graph.call_function(torch.add, (base, other))
        else:
            index = constants.add(graph, f"{total.node}_places", other_at, [-1])
            base, other = _promoted(graph, base, other)
            result = graph.call_function(torch.index_add, (base, total.dim, index, other))
        result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _spread(
    graph: fx.Graph, narrow: fx.Node, spread: Spread, constants: Constants, name: str
) -> fx.Node:
    """Channels at their places among zeros or constants: these are made, the others added in."""
    shape = [1] * spread.rank
    shape[spread.dim] = -1
    values = spread.shift if spread.shift is not None else [0.0] * spread.size
    shift = constants.add(graph, f"{name}_shift", values, shape)
    if not spread.places:  # nothing is left of it but its other sizes
        margins = [0, 0] * (spread.rank - spread.dim - 1) + [0, spread.size]
        return _shifted(graph, graph.call_function(functional.pad, (narrow, margins)), shift)
    index = constants.add(graph, f"{name}_places", spread.places, [-1])
    one = graph.call_function(torch.narrow, (narrow, spread.dim, 0, 1))
    blank = graph.call_function(torch.zeros_like, (one,))
    full = _shifted(graph, blank, shift)
    return graph.call_function(torch.index_add, (full, spread.dim, index, narrow))


def _shifted(graph: fx.Graph, value: fx.Node, shift: fx.Node) -> fx.Node:
    """`value + shift` in the dtype that `value` happens to have (whole numbers, autocast)."""
    return graph.call_function(torch.add, (value, graph.call_method("type_as", (shift, value))))


def _promoted(graph: fx.Graph, left: fx.Node, right: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Both in the dtype of their sum: `index_add`, unlike `+`, takes no two dtypes, and under
    autocast a stream and a branch often have two."""
    dtypes = [graph.call_function(getattr, (x, "dtype")) for x in (left, right)]
    dtype = graph.call_function(torch.promote_types, tuple(dtypes))
    first, second = (graph.call_method("to", (x, dtype)) for x in (left, right))
    return first, second
