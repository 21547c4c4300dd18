"""The dense network that a demon started from, without its numbers: every narrowing is planned
from here, so that plans do not pile up and one plan says what became of the whole network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from demp_fx.channels.analysis import walk
from demp_fx.channels.cuts import Cuts
from demp_fx.channels.facts import Facts
from demp_fx.passes.make_plan import Planned, fit
from demp_fx.passes.narrow import narrow
from demp_fx.passes.neurons import Neurons, label_along, neurons, select
from demp_fx.passes.plan import PruningPlan
from demp_fx.passes.twin import without_numbers
from demp_fx.recipe import Measure, Recipe
from demp_fx.tracing.module import TracedModule
from demp_fx.training.deaths import Dead
from demp_fx.training.events import Size


@dataclass(frozen=True)
class Narrowing:
    """A narrowing of the dense network: what was planned, and its layers of neurons.

    `kept`: for each layer of neurons, which channels of the dense one it has. `gone`: which of the
    dense ones were given up, the level that they stood at with them.
    """

    planned: Planned | None
    gone: dict[str, Dead]
    layers: list[Neurons]
    kept: dict[str, Tensor]
    size: Size

    @property
    def plan(self) -> PruningPlan:
        return PruningPlan() if self.planned is None else self.planned.plan


class Dense:
    """A dense network: shapes, graph, layers of neurons."""

    def __init__(self, graph: TracedModule, recipe: Recipe) -> None:
        self.name = type(graph).__name__
        self.graph = without_numbers(graph)
        walked = walk(self.graph)
        self.layers = select(neurons(self.graph, walked), recipe.takes)
        self.cuts: Cuts = recipe.cuts
        state = [*self.graph.named_parameters(), *self.graph.named_buffers()]
        self.shapes = {name: tensor.shape for name, tensor in state}
        self.size = Size(
            params=sum(p.numel() for p in self.graph.parameters()),
            macs=walked.system.macs,
            channels=sum(layer.width for layer in self.layers),
        )

    def whole(self) -> Narrowing:
        """The dense network as a narrowing of itself."""
        kept = {n.node: torch.ones(n.width, dtype=torch.bool) for n in self.layers}
        return Narrowing(None, {}, self.layers, kept, self.size)

    def without(self, gone: Mapping[str, Dead]) -> Narrowing:
        """The network without these channels (of the dense one), as far as they can go."""
        seen = {}
        for layer in self.layers:
            dead = gone.get(layer.node)
            if dead is not None and bool(dead.mask.any()):
                facts = Facts.of(dead.mask, dead.level.to(torch.float64).expand(2, -1))
                if facts is not None:
                    seen[layer.node] = layer.dim, facts
        if not seen:
            return self.whole()
        planned = fit(self.graph, walk(self.graph, seen), self.cuts)
        kept = {layer.node: _kept(planned, layer) for layer in self.layers}
        keep = planned.plan.keep
        layers = [layer.narrowed(kept[layer.node], keep) for layer in self.layers]
        size = Size(
            params=sum(p.numel() for p in planned.module.parameters()),
            macs=planned.after.system.macs,
            channels=sum(layer.width for layer in layers),
        )
        return Narrowing(planned, dict(gone), layers, kept, size)

    def share(self, narrowing: Narrowing, measure: Measure) -> float:
        """How much of the dense network is left."""
        left: int = getattr(narrowing.size, measure)
        whole: int = getattr(self.size, measure)
        return left / whole

    def nothing(self) -> Planned:
        """The plan that removes nothing."""
        return fit(self.graph, walk(self.graph), self.cuts)

    def skeleton(self, narrowing: Narrowing) -> TracedModule:
        """The module of a narrowing, its numbers still to be filled in."""
        return narrow(without_numbers(self.graph, "cpu"), narrowing.plan)


def _kept(planned: Planned, layer: Neurons) -> Tensor:
    """Which channels of a layer of neurons are there after a narrowing."""
    walked = planned.before
    node = next(n for n in walked.env if n.name == layer.node)
    return planned.solution.kept(label_along(walked, node, layer.dim))
