"""Numbers move from one narrowing of a network to the next one.

All narrowings are of the same dense network, whose indices name the channels. What both have is
copied. What only the new one has comes back as zeros, which is what it was worth when it went.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from demp_fx.passes.plan import PruningPlan
from demp_fx.passes.weights import select
from demp_fx.training.fold import folded
from demp_fx.training.optimizer import Move, follow

Keep = Mapping[str, Mapping[int, list[int]]]
"""For each parameter and buffer that is narrower than in the dense network, by dim: what stays."""


def reindexed(
    tensor: Tensor, dense: torch.Size, old: Mapping[int, list[int]],
    new: Mapping[int, list[int]], blank: float = 0.0,
) -> Tensor:  # fmt: skip
    """A tensor with the indices `old` of the `dense` shape, as one with the indices `new`.

    Only dims of the size that the old indices give are touched (factored moments have others).
    """
    for dim in sorted({*old, *new}):
        size = dense[dim]
        before = torch.tensor(old.get(dim, range(size)))
        after = torch.tensor(new.get(dim, range(size)))
        if tensor.size(dim) != before.numel() or torch.equal(before, after):
            continue
        place = torch.full((size,), -1)
        place[before] = torch.arange(before.numel())
        there = place[after]
        kept = select(tensor, {dim: there[there >= 0].tolist()})
        if bool((there >= 0).all()):
            tensor = kept
            continue
        shape = list(tensor.shape)
        shape[dim] = after.numel()
        at = (there >= 0).nonzero().reshape(-1).to(tensor.device)
        tensor = tensor.new_full(shape, blank).index_copy(dim, at, kept)
    return tensor


def widened(
    tensor: Tensor, dense: torch.Size, keep: Mapping[int, list[int]],
    grouped: list[list[int]] | None, blank: float,
) -> Tensor:  # fmt: skip
    """A narrow tensor at the dense shape, `blank` where it has nothing: undoes `narrow.select`."""
    if grouped is not None:
        index = torch.tensor(grouped, device=tensor.device)
        rows = index.repeat_interleave(tensor.size(0) // len(grouped), 0)
        rows = rows.reshape(*rows.shape, *[1] * (tensor.dim() - 2)).expand(tensor.shape)
        wide = tensor.new_full((tensor.size(0), dense[1], *tensor.shape[2:]), blank)
        tensor = wide.scatter(1, rows, tensor)
    for dim, kept in keep.items():
        shape = list(tensor.shape)
        shape[dim] = dense[dim]
        at = torch.tensor(kept, device=tensor.device)
        tensor = tensor.new_full(shape, blank).index_copy(dim, at, tensor)
    return tensor


class Transfer:
    """From a narrowing `old` of a dense network to a narrowing `new`; `shapes`: of its tensors."""

    def __init__(
        self, shapes: Mapping[str, torch.Size], old: PruningPlan, new: PruningPlan
    ) -> None:
        self.shapes, self.folds = shapes, new.folds
        self.old: Keep = old.keep
        self.new: Keep = new.keep
        self.grouped = old.grouped, new.grouped

    def tensor(self, name: str, value: Tensor) -> Tensor:
        """What becomes of the tensor called `name`, or of a moment of it."""
        old, new = self.old.get(name, {}), self.new.get(name, {})
        blank = 1.0 if name.endswith("running_var") else 0.0
        before, after = (grouped.get(name) for grouped in self.grouped)
        if before is None and after is None:
            return reindexed(value, self.shapes[name], old, new, blank)
        wide = widened(value, self.shapes[name], old, before, blank)
        return select(wide, {d: list(index) for d, index in new.items()}, after)

    def fill(self, skeleton: fx.GraphModule, source: nn.Module) -> None:
        """Give a new narrowing the numbers, the flags and the devices of the old one."""
        parameters = dict(source.named_parameters())
        changed = folded(self.folds, parameters, self.old)
        for name, p in skeleton.named_parameters():
            value = changed.get(name, parameters[name].detach())
            p.data = _own(self.tensor(name, value), parameters[name])
            p.requires_grad_(parameters[name].requires_grad)
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        buffers = dict(source.named_buffers())
        for path, module in skeleton.named_modules():
            for key, value in module._buffers.items():
                name = f"{path}.{key}".lstrip(".")
                if value is not None and name in self.shapes:
                    module._buffers[key] = _own(self.tensor(name, buffers[name]), buffers[name])
                elif value is not None:
                    module._buffers[key] = value.to(device)
        modes = {name: m.training for name, m in source.named_modules()}
        for name, module in skeleton.named_modules():
            module.training = modes.get(name, source.training)

    def optimizer(self, optimizer: torch.optim.Optimizer, old: nn.Module, new: nn.Module) -> None:
        """Let an optimizer train the new parameters, its moments moved along."""
        twins = dict(new.named_parameters())
        moves: dict[Tensor, Move] = {
            p: (twins[name], self._mover(name)) for name, p in old.named_parameters()
        }
        follow(optimizer, moves)

    def _mover(self, name: str) -> Callable[[Tensor], Tensor]:
        return lambda value: self.tensor(name, value)


def _own(new: Tensor, old: Tensor) -> Tensor:
    """A tensor that shares no memory with the old one."""
    shared = new.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()
    return new.clone() if shared else new


class Snapshot:
    """What a commit changes, so that it can be undone: modules, and an optimizer."""

    def __init__(
        self, modules: list[fx.GraphModule], optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.modules = [(m, _tables(m), m.graph) for m in modules]
        self.optimizer = optimizer
        if optimizer is not None:
            self.groups = [list(group["params"]) for group in optimizer.param_groups]
            self.state = dict(optimizer.state)

    def restore(self) -> None:
        """Put everything back as it was."""
        for module, tables, graph in self.modules:
            module.__dict__.update(tables)
            module.graph = graph
        if self.optimizer is not None:
            for group, params in zip(self.optimizer.param_groups, self.groups, strict=True):
                group["params"][:] = params
            self.optimizer.state.clear()
            self.optimizer.state.update(self.state)


_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "meta")


def _tables(module: fx.GraphModule) -> dict[str, Any]:
    return {key: module.__dict__[key] for key in _TABLES}


def install(target: fx.GraphModule, new: fx.GraphModule) -> None:
    """Turn `target` into what `new` is; whoever holds it holds the new network."""
    target.__dict__.update(_tables(new))
    target.graph = new.graph
