"""The rewrite: a plan and a graph in, a physically narrower GraphModule out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from demp_fx.errors import UsageError
from demp_fx.passes.count import recount
from demp_fx.passes.layers import sizes
from demp_fx.passes.plan import (
    Folding,
    Gather,
    Literal,
    PruningPlan,
    Regroup,
    Selection,
    Spread,
    Sum,
)
from demp_fx.tracing.module import TracedModule, assemble

CACHE = 1 << 18  # bytes


def narrow(graph: fx.GraphModule, plan: PruningPlan) -> TracedModule:
    """Carry out `plan` on a traced module.

    Returns a new module with parameters of its own; `graph` is not changed. Tied parameters stay
    tied. Raises `UsageError` where the plan is of another model.
    """
    modules = dict(graph.named_modules(remove_duplicate=False))
    weights = _Weights(graph, plan, modules)
    constants = _Constants(graph)
    new_graph = _rewrite(graph.graph, plan, constants)
    root = weights.fill(nn.Module(), graph)
    root.training = graph.training
    for name, value in constants.parts.items():
        root.register_buffer(name, value, persistent=False)
    root._non_persistent_buffers_set |= graph._non_persistent_buffers_set
    module = assemble(root, new_graph, type(graph).__name__)
    module.meta = dict(graph.meta)
    return module


class _Weights:
    """Narrow copies of tensors and layers, one for each original: what is tied stays tied."""

    def __init__(
        self, graph: fx.GraphModule, plan: PruningPlan, modules: Mapping[str, nn.Module]
    ) -> None:
        self.state = {
            f"{prefix}.{key}" if prefix else key: tensor
            for prefix, module in modules.items()
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        self.names: dict[int, str] = {}
        for name, tensor in self.state.items():
            self.names.setdefault(id(tensor), name)
        self._check(plan)
        self.keep, self.grouped = plan.keep, plan.grouped
        self.channels = {
            id(modules[str(node.target)]): plan.nodes[node.name][1]
            for node in graph.graph.nodes
            if node.op == "call_module" and 1 in plan.nodes.get(node.name, {})
        }
        self.folds: dict[str, list[Folding]] = defaultdict(list)
        for fold in plan.folds:
            self.folds[fold.bias or fold.weight].append(fold)
        self.indices: dict[int, Tensor] = {}
        self.tensors: dict[int, Tensor] = {}
        self.modules: dict[int, nn.Module] = {}

    def _check(self, plan: PruningPlan) -> None:
        for name, shape in plan.shapes.items():
            if name not in self.state:
                raise UsageError(f"the plan narrows {name!r}, which this model does not have")
            found = list(self.state[name].shape)
            if found != shape:
                raise UsageError(f"the plan is for {name!r} of shape {shape}, here it is {found}")

    def tensor(self, old: Tensor) -> Tensor:
        """The narrow copy of a parameter or buffer."""
        new = self.tensors.get(id(old))
        if new is None:
            name = self.names.get(id(old), "")
            data = whole = old.detach()
            if name in self.folds:
                data = self._folded(data, self.folds[name])
            keep = {d: self._index(kept) for d, kept in self.keep.get(name, {}).items()}
            data = select(data, keep, self.grouped.get(name))
            if data is whole:
                data = data.clone()
            new = data
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(data, requires_grad=old.requires_grad)
            self.tensors[id(old)] = new
        return new

    def _index(self, kept: list[int]) -> Tensor:
        """A list of the plan as a tensor: one for all parameters that it is the list of."""
        index = self.indices.get(id(kept))
        if index is None:
            index = self.indices[id(kept)] = numbers(kept)
        return index

    def _folded(self, data: Tensor, folds: list[Folding]) -> Tensor:
        data = data.clone()
        for fold in folds:
            weight = self.state[fold.weight].detach().movedim(fold.dim, 0)
            dropped = weight[numbers(fold.dropped).to(weight.device)].to(torch.float64)
            if fold.bias is not None:
                values = torch.tensor(fold.values, dtype=torch.float64, device=data.device)
                shift = torch.tensordot(values, dropped.flatten(2).sum(2) if dropped.dim() > 2
                                        else dropped, dims=1)  # fmt: skip
                data += shift.to(data.dtype)
            else:
                mix = torch.tensor(fold.mix, dtype=torch.float64, device=data.device)
                view = data.movedim(fold.dim, 0)
                view[fold.carriers] += torch.tensordot(mix, dropped, dims=1).to(data.dtype)
        return data

    def module(self, old: nn.Module) -> nn.Module:
        """The narrow copy of a layer or container, and of all that is in it."""
        new = self.modules.get(id(old))
        if new is None:
            new = self.modules[id(old)] = self.fill(shallow(old), old)
            groups = None
            if self.grouped:
                groups = self.grouped.get(self.names.get(id(getattr(old, "weight", None)), ""))
            count = None if groups is None else len(groups)
            for key, value in sizes(new, count, self.channels.get(id(old))):
                if getattr(new, key) != value:
                    setattr(new, key, value)
        return new

    def fill(self, new: nn.Module, old: nn.Module) -> nn.Module:
        """Give `new` the narrow copies of everything that `old` holds."""
        for key, parameter in old._parameters.items():
            new._parameters[key] = None if parameter is None else self.tensor(parameter)  # type: ignore[assignment]
        for key, buffer in old._buffers.items():
            new._buffers[key] = None if buffer is None else self.tensor(buffer)
        for key, child in old._modules.items():
            new._modules[key] = None if child is None else self.module(child)
        return new


def shallow(module: nn.Module) -> nn.Module:
    """A layer of the same class and settings, with empty tables to fill."""
    new = module.__class__.__new__(module.__class__)  # copy.copy is refused by parametrized ones
    new.__dict__.update({
        key: value.copy() if isinstance(value, (dict, set)) else value
        for key, value in module.__dict__.items()
    })  # fmt: skip
    return new


def numbers(values: list[int] | list[list[int]]) -> Tensor:
    """A list as a tensor, several times faster than torch makes it one."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def select(
    tensor: Tensor,
    keep: Mapping[int, list[int] | Tensor],
    grouped: list[list[int]] | None = None,
) -> Tensor:
    """The entries of `tensor` at the kept indices of each dim; memory format and dtype stay.

    `grouped`: other indices of dim 1 in each of equal blocks of what is left of dim 0.
    """
    if not keep and grouped is None:
        return tensor
    last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(
        memory_format=torch.channels_last
    )  # fmt: skip
    indices = {
        dim: (kept if isinstance(kept, Tensor) else numbers(kept)).to(tensor.device)
        for dim, kept in keep.items()
    }
    if indices.keys() >= {0, 1}:
        tensor = _rows_and_columns(tensor, indices.pop(0), indices.pop(1))
    for dim, index in indices.items():
        tensor = tensor.index_select(dim, index)
    if grouped is not None:
        index = numbers(grouped).to(tensor.device)
        rows = index.repeat_interleave(tensor.size(0) // len(grouped), 0)
        rows = rows.reshape(*rows.shape, *[1] * (tensor.dim() - 2))
        tensor = tensor.gather(1, rows.expand(*rows.shape[:2], *tensor.shape[2:]))
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor


def _rows_and_columns(tensor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The entries at indices of dims 0 and 1: of a few rows at a time, which stay in the cache."""
    made = tensor.new_empty((rows.numel(), columns.numel(), *tensor.shape[2:]))
    few = max(1, CACHE * tensor.size(0) // max(1, tensor.nbytes))
    for some, part in zip(rows.split(few), made.split(few), strict=True):
        torch.index_select(tensor.index_select(0, some), 1, columns, out=part)
    return made


# -- the graph ----------------------------------------------------------------------------------


def _rewrite(old: fx.Graph, plan: PruningPlan, constants: _Constants) -> fx.Graph:
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in old.nodes:
        copies[node] = new.node_copy(node, copies.__getitem__)
    new._codegen = old._codegen
    named = {node.name: copies[node] for node in old.nodes}
    shared: dict[tuple[str, int, tuple[int, ...]], fx.Node] = {}
    given: dict[tuple[str, str], fx.Node] = {}  # what gathers have left, by producer and consumer
    for literal in plan.literals:
        _set(named[literal.node], literal)
    for selection in plan.selections:
        _select(new, selection, named, constants)
    for gather in plan.gathers:
        _gather(new, gather, named, constants, shared, given)
    for regroup in plan.regroups:
        _regroup(new, regroup, named, constants, given)
    for spread in plan.spreads:
        producer, consumer = named[spread.producer], named[spread.consumer]
        chain = [n for n in consumer.all_input_nodes if n is producer or producer in n.args]
        with new.inserting_before(consumer):
            put = _spread(new, chain[0], spread, constants, consumer.name)
        consumer.replace_input_with(chain[0], put)
    for total in plan.sums:
        _sum(new, total, named, constants)
    for count in plan.counts:
        named[count.node] = recount(new, named[count.node], count, constants.module)
    for selection in plan.selections:
        for name in reversed(selection.path):
            if name in named and not named[name].users:
                new.erase_node(named.pop(name))
    new.lint()
    return new


class _Constants:
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


def _set(node: fx.Node, literal: Literal) -> None:
    value: Any = literal.value
    if literal.slice:
        value = slice(*literal.value)  # type: ignore[misc]
    if literal.target is not None:
        node.target = literal.target if node.op == "call_method" else getattr(torch, literal.target)
    where, *path = literal.path
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
    graph: fx.Graph, gather: Gather, named: dict[str, fx.Node], constants: _Constants,
    shared: dict[tuple[str, int, tuple[int, ...]], fx.Node],
    given: dict[tuple[str, str], fx.Node],
) -> None:  # fmt: skip
    consumer = named[gather.consumer]
    source = given.get((gather.producer, gather.consumer), named[gather.producer])
    key = (source.name, gather.dim, tuple(gather.index))
    if key not in shared:
        name = f"{gather.producer}_keep{len(shared)}"
        with graph.inserting_before(source.next):
            shared[key] = _pick(graph, source, gather.dim, gather.index, name, constants)
        shared[key].meta = {k: v for k, v in source.meta.items() if k == "source"}
    consumer.replace_input_with(source, shared[key])
    given[gather.producer, gather.consumer] = shared[key]


def _regroup(
    graph: fx.Graph, regroup: Regroup, named: dict[str, fx.Node], constants: _Constants,
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
    graph: fx.Graph, source: fx.Node, dim: int, index: list[int], name: str, constants: _Constants
) -> fx.Node:
    """Channels of a value, as a view where they are a run (at the insertion point)."""
    first, size = index[0] if index else 0, len(index)
    if index == list(range(first, first + size)):
        return graph.call_function(torch.narrow, (source, dim, first, size))
    numbers = constants.add(graph, name, index, [-1])
    return graph.call_function(torch.index_select, (source, dim, numbers))


def _select(
    graph: fx.Graph, selection: Selection, named: dict[str, fx.Node], constants: _Constants
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


def _sum(graph: fx.Graph, total: Sum, named: dict[str, fx.Node], constants: _Constants) -> None:
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
    graph: fx.Graph, narrow: fx.Node, spread: Spread, constants: _Constants, name: str
) -> fx.Node:
    """Channels at their places among zeros or constants: these are made, the others added in."""
    shape = [1] * spread.rank
    shape[spread.dim] = -1
    values = spread.shift if spread.shift is not None else [0.0] * spread.size
    shift = constants.add(graph, f"{name}_shift", values, shape)
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
