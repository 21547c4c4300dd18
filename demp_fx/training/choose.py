"""Which of the dead go: all that may, or, under a target, as many as it allows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from demp_fx.passes.neurons import Neurons
from demp_fx.recipe import Measure, Recipe
from demp_fx.training.deaths import Dead
from demp_fx.training.dense import Dense, Narrowing


class Choice:
    """The dead of one check, and the narrowings that giving up some of them leads to."""

    def __init__(
        self, dense: Dense, now: Narrowing, dead: Mapping[str, Dead], recipe: Recipe,
        module: fx.GraphModule,
    ) -> None:  # fmt: skip
        self.dense, self.now, self.dead, self.recipe = dense, now, dead, recipe
        self.scores = {layer.node: scores(layer, module) for layer in now.layers}
        self.fresh = {
            layer.node: dead[layer.node].mask & ~self._given_up(layer.node) for layer in now.layers
        }
        order = [
            (float(self.scores[node][k]), node, int(k))
            for node, mask in self.fresh.items()
            for k in mask.nonzero().reshape(-1)
        ]
        self.order = [(node, k) for _, node, k in sorted(order)]

    def all(self) -> Narrowing:
        """Without all that are dead; the present narrowing where that changes nothing."""
        return self.first(len(self.order))

    def first(self, many: int) -> Narrowing:
        """Without so many of the dead, the least first."""
        masks = {node: torch.zeros_like(mask) for node, mask in self.fresh.items()}
        for node, k in self.order[:many]:
            masks[node][k] = True
        gone, changed = {}, False
        for node, mask in masks.items():
            kept, before = self.now.kept[node], self.now.gone.get(node)
            old = self._given_up(node)
            going = ~old & goes(
                mask | old, self.scores[node], self.recipe.min_width, self.recipe.round_to
            )
            whole = torch.zeros_like(kept) if before is None else before.mask.clone()
            level = torch.zeros(kept.numel()) if before is None else before.level.clone()
            whole[kept] |= going
            level[kept] = torch.where(going, self.dead[node].level, level[kept])
            gone[node] = Dead(whole, level)
            changed |= bool(going.any())
        return self.dense.without(gone) if changed else self.now

    def down_to(self, measure: Measure, share: float) -> Narrowing:
        """Without as many as bring the network nearest to a share of the dense one."""
        low, high = 0, len(self.order)  # bisection: sizes fall with the number that goes
        nearest = self.now
        while low < high:
            middle = (low + high) // 2
            tried = self.first(middle + 1)
            left = self.dense.share(tried, measure)
            if abs(left - share) <= abs(self.dense.share(nearest, measure) - share):
                nearest = tried
            low, high = (middle + 1, high) if left > share else (low, middle)
        return nearest

    def _given_up(self, node: str) -> Tensor:
        """Channels that are given up already, and still there for others' sake."""
        before, kept = self.now.gone.get(node), self.now.kept[node]
        return kept[kept] & False if before is None else before.mask[kept]


def goes(dead: Tensor, score: Tensor, least: int, multiple: int) -> Tensor:
    """Which of the dead go, so that at least `least` channels stay, a multiple of `multiple`.

    Where dead ones have to stay, those with the highest `score` do.
    """
    width = dead.numel()
    stay = max(width - int(dead.sum()), min(least, width))
    stay = min(width, -(-stay // multiple) * multiple)
    if stay >= width:
        return torch.zeros_like(dead)
    candidates = dead.nonzero().reshape(-1)
    order = candidates[score[candidates].argsort(stable=True)]
    result = torch.zeros_like(dead)
    result[order[: width - stay]] = True
    return result


def scores(layer: Neurons, module: fx.GraphModule) -> Tensor:
    """How much there is of each neuron: the sum of |scale|s, or of norms of its filters."""
    parameters = dict(module.named_parameters())
    total = torch.zeros(layer.width, dtype=torch.float64)
    weights = [p for p in layer.parts if p.parameter.endswith("weight")]
    scales = [p for p in weights if parameters[p.parameter].dim() == 1]
    for part in scales or weights:
        value = parameters[part.parameter].detach().movedim(part.dim, 0)
        size = value.reshape(value.shape[0], -1).norm(dim=1).to("cpu", torch.float64)
        mine = part.channel >= 0
        total.index_add_(0, part.channel[mine], size[mine])
    return total
