"""Optimizers follow their parameters: re-pointed in place, every moment sliced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from demp_fx.errors import UsageError
from demp_fx.passes.plan import PruningPlan
from demp_fx.passes.weights import select

Move = tuple[Tensor, Callable[[Tensor], Tensor]]
"""A parameter's successor, and what becomes of a state tensor of the parameter's rank."""


def repoint(
    optimizer: torch.optim.Optimizer, old: nn.Module, new: nn.Module, plan: PruningPlan
) -> None:
    """Let `optimizer` train the parameters of `new` in the places of those of `old`.

    Groups, hyper-parameters and step counts stay. State tensors of a parameter's shape are sliced
    as the parameter was (of factored moments, the dims that they share with it). Parameters that
    `new` does not have stay where they are.
    """
    twins = dict(new.named_parameters(remove_duplicate=False))
    moves: dict[Tensor, Move] = {}
    for name, p in old.named_parameters():
        if name in twins:
            keep, grouped = plan.keep.get(name, {}), plan.grouped.get(name)
            moves[p] = twins[name], _slicer(p, keep, grouped)
    follow(optimizer, moves)


def follow(optimizer: torch.optim.Optimizer, moves: Mapping[Tensor, Move]) -> None:
    """Exchange parameters for their successors; parameters that are not in `moves` stay."""
    flat = isinstance(optimizer, torch.optim.LBFGS)
    row = optimizer.param_groups[0]["params"] if flat else []
    state: dict[Tensor, Any] = {
        moves[p][0]: {
            key: _flat_moved(value, row, moves) if flat else _moved(value, p, moves[p][1])
            for key, value in entries.items()
        }
        for p, entries in optimizer.state.items()
        if p in moves
    }
    for p in moves:
        optimizer.state.pop(p, None)
    optimizer.state.update(state)
    for group in optimizer.param_groups:  # the lists stay: LBFGS holds its own by another name, too
        group["params"][:] = [moves[p][0] if p in moves else p for p in group["params"]]
    if flat:
        optimizer._numel_cache = None  # type: ignore[attr-defined]


def check(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises `UsageError` where it trains nothing of the model."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"the optimizer is to be one of torch.optim's, not {optimizer!r}")
    own = set(model.parameters())
    if not any(p in own for group in optimizer.param_groups for p in group["params"]):
        raise UsageError("the optimizer has no parameter of this model: it is of another one")


def _flat_moved(value: object, row: list[Tensor], moves: Mapping[Tensor, Move]) -> object:
    """A state in which all parameters in a `row` are one vector, end to end."""
    if isinstance(value, list):
        return [_flat_moved(item, row, moves) for item in value]
    sizes = [p.numel() for p in row]
    if not isinstance(value, Tensor) or value.shape != (sum(sizes),):
        return value
    parts = [
        moves[p][1](part.view_as(p)) if p in moves else part
        for p, part in zip(row, value.split(sizes), strict=True)
    ]
    return torch.cat([part.reshape(-1) for part in parts])


def _moved(value: object, parameter: Tensor, move: Callable[[Tensor], Tensor]) -> object:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.dim() != parameter.dim():
        return value
    return move(value)


def _slicer(
    parameter: Tensor, keep: dict[int, list[int]], grouped: list[list[int]] | None
) -> Callable[[Tensor], Tensor]:
    def move(value: Tensor) -> Tensor:
        shared = {d: k for d, k in keep.items() if value.size(d) == parameter.size(d)}
        blocks = grouped if value.shape[:2] == parameter.shape[:2] else None
        return select(value, shared, blocks).clone() if shared or blocks else value

    return move
