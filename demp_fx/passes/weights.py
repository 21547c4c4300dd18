"""Narrow copies of the parameters, buffers and layers that a plan is about."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx, nn

from demp_fx.errors import UsageError
from demp_fx.passes.layers import sizes
from demp_fx.passes.plan import Folding, PruningPlan

CACHE = 1 << 18  # bytes


class Weights:
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
                new = _parameter(data, old)
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
        if isinstance(old, torch.jit.ScriptModule):  # nobody can exchange what is in it
            new = self.modules.setdefault(id(old), copy.deepcopy(old))
        if new is None:
            new = self.modules[id(old)] = self.fill(shallow(old), old)
            if "parametrizations" in old._modules:
                return new  # it stays as wide as it is; to ask for its weight would compute it
            groups = None
            if self.grouped:
                groups = self.grouped.get(self.names.get(id(old._parameters.get("weight")), ""))
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


def _parameter(data: Tensor, old: nn.Parameter) -> nn.Parameter:
    """A parameter of the class of `old`, with the attributes that somebody gave it (such as marks
    of what is not to decay)."""
    kind = type(old)
    if kind is nn.Parameter or nn.Parameter not in kind.__mro__:
        new = nn.Parameter(data, requires_grad=old.requires_grad)
    else:
        new = Tensor._make_subclass(kind, data, old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def shallow(module: nn.Module) -> nn.Module:
    """A layer of the same class and settings, with empty tables to fill."""
    new = module.__class__.__new__(module.__class__)  # copy.copy is refused by parametrized ones
    new.__dict__.update({
        key: value.copy() if isinstance(value, (dict, set)) else value
        for key, value in module.__dict__.items()
        if key != "_compiled_call_impl"  # by torch.compile, of the old one
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
    few = max(1, CACHE * tensor.size(0) // max(1, tensor.nbytes))
    if few >= rows.numel():
        return tensor.index_select(0, rows).index_select(1, columns)
    made = tensor.new_empty((rows.numel(), columns.numel(), *tensor.shape[2:]))
    for some, part in zip(rows.split(few), made.split(few), strict=True):
        torch.index_select(tensor.index_select(0, some), 1, columns, out=part)
    return made
