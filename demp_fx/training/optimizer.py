"""Optimizers follow their parameters: re-pointed in place, every moment sliced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from demp_fx.passes.narrow import select
from demp_fx.passes.plan import PruningPlan

Cut = tuple[dict[int, list[int]], list[list[int]] | None]


def repoint(
    optimizer: torch.optim.Optimizer, old: nn.Module, new: nn.Module, plan: PruningPlan
) -> None:
    """Let `optimizer` train the parameters of `new` in the places of those of `old`.

    Groups, hyper-parameters and step counts stay. State tensors of a parameter's shape are sliced
    as the parameter was (of factored moments, the dims that they share with it). Parameters that
    `new` does not have stay where they are.
    """
    names = {id(p): name for name, p in old.named_parameters()}
    twins = dict(new.named_parameters(remove_duplicate=False))
    moves: dict[Tensor, tuple[Tensor, Cut]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            twin = twins.get(names.get(id(p), ""))
            if twin is not None:
                name = names[id(p)]
                moves[p] = twin, (plan.keep.get(name, {}), plan.grouped.get(name))
    state: dict[Tensor, Any] = {
        moves[p][0]: {key: _sliced(value, p, moves[p][1]) for key, value in entries.items()}
        for p, entries in optimizer.state.items()
        if p in moves
    }
    for p in moves:
        optimizer.state.pop(p, None)
    optimizer.state.update(state)
    for group in optimizer.param_groups:
        group["params"] = [moves[p][0] if p in moves else p for p in group["params"]]


def _sliced(value: object, parameter: Tensor, cut: Cut) -> object:
    if not isinstance(value, Tensor) or value.dim() != parameter.dim():
        return value
    keep, grouped = cut
    shared = {d: k for d, k in keep.items() if value.size(d) == parameter.size(d)}
    grouped = grouped if value.shape[:2] == parameter.shape[:2] else None
    return select(value, shared, grouped).clone() if shared or grouped else value
