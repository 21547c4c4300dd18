"""From what is known to a plan that fits: solve, plan, try it on meta tensors, pin what refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from demp_fx.calls import called
from demp_fx.channels.analysis import walk
from demp_fx.channels.constraints import Site
from demp_fx.channels.cuts import Cuts, decide
from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import varying
from demp_fx.channels.nodes import RefusalError
from demp_fx.channels.solution import Solution
from demp_fx.channels.walk import Walk
from demp_fx.errors import DempError
from demp_fx.passes.asked import Asked
from demp_fx.passes.narrow import narrow
from demp_fx.passes.plan import PruningPlan
from demp_fx.passes.planner import plan_of
from demp_fx.passes.resize import ROWS
from demp_fx.passes.sizes import MisfitError
from demp_fx.turns import in_turn

_NOTHING = Asked()


@dataclass
class Planned:
    """A plan that fits, what it rests on, and the narrow module that it was tried on."""

    plan: PruningPlan
    module: fx.GraphModule
    solution: Solution
    before: Walk
    after: Walk


def make_plan(
    graph: fx.GraphModule,
    observed: Mapping[str, tuple[int, Facts]] | None = None,
    cuts: Cuts = "pays",
    *,
    keep: Sequence[str] = (),
    round_to: int = 1,
) -> PruningPlan:
    """What can be cut out of a traced module: what the weights prove dead, and what was observed.

    `cuts`: whether the graph may be cut inside a residual sum, or before one reader of several;
    `keep` and `round_to`: see `compile`.
    """
    return fit(graph, walk(graph, observed), cuts, Asked(keep, round_to)).plan


@in_turn
def fit(
    graph: fx.GraphModule, walked: Walk, cuts: Cuts = "pays", asked: Asked = _NOTHING
) -> Planned:
    """Solve and plan; where a node's code does not take its new sizes, pin it and start over."""
    asked.pin_layers(walked)
    pinned: set[fx.Node] = set()
    refused: Counter[fx.Node] = Counter()
    for node in walked.env:
        if node.name in walked.sliced and called(node) not in ROWS:
            pinned.add(node)
            _pin(walked, node)
    while True:
        solution = decide(walked.system, cuts)
        if asked.pin_widths(walked, solution):
            continue
        try:
            plan = plan_of(walked, solution)
            module = narrow(graph, plan)
            planned = _planned(walked, plan)
            after = walk(module, with_facts=False, labelled=False, planned=planned)
            misfits = [_original(graph, node) for node in after.refused]
            misfits = misfits or _misfits(walked, planned, after)
            misfits = misfits or _misfitting_pieces(walked, solution, after)
        except MisfitError as refusal:
            misfits = list(refusal.nodes)
        except RefusalError as refusal:
            misfits = [_original(graph, refusal.node)]
        if not misfits:
            return Planned(plan, module, solution, walked, after)
        for misfit in misfits:
            _pin_around(walked, misfit, pinned, many=2 ** refused[misfit])
            refused[misfit] += 1


def _planned(walked: Walk, plan: PruningPlan) -> dict[str, Tensor]:
    """What each node of the narrow graph should give, if it is a tensor."""
    planned: dict[str, Tensor] = {}
    for node, value in walked.env.items():
        if isinstance(value, Tensor):
            new = plan.nodes.get(node.name)
            shape = [(new or {}).get(d, n) for d, n in enumerate(value.shape)]
            planned[node.name] = (
                torch.empty(shape, dtype=value.dtype, device="meta") if new else value
            )
    return planned


def _misfits(walked: Walk, planned: Mapping[str, Tensor], after: Walk) -> list[fx.Node]:
    """The nodes of the original whose narrow twins do not have the planned shapes, though what
    goes into them does."""
    shapes = {n.name: v.shape for n, v in after.env.items() if isinstance(v, Tensor)}
    misfits: dict[fx.Node, None] = {}
    spoilt: set[fx.Node] = set()
    for node in walked.env:
        if any(n in spoilt for n in node.all_input_nodes):
            spoilt.add(node)
            continue
        wanted = planned.get(node.name)
        if wanted is not None and shapes.get(node.name, wanted.shape) != wanted.shape:
            misfits[node] = None
            spoilt.add(node)
    return list(misfits)


def _misfitting_pieces(walked: Walk, solution: Solution, after: Walk) -> list[fx.Node]:
    """The first node whose narrow twin gives pieces of other sizes than planned (they need not be
    taken out one by one: `cat(x.tensor_split(3)[::-1])`)."""
    found = {n.name: v for n, v in after.env.items()}
    for node, value in walked.env.items():
        new = found.get(node.name)
        if not isinstance(value, (list, tuple)) or not isinstance(new, (list, tuple)):
            continue
        for old, piece in zip(value, new, strict=False):
            if not isinstance(old, Tensor) or not isinstance(piece, Tensor):
                continue
            for label in walked.value(old).labels:
                dims = varying(label)
                if len(dims) == 1 and piece.dim() == old.dim():
                    kept = int(solution.kept(label.reshape(-1)).sum())
                    if piece.size(dims[0]) != kept:
                        return [node]
    return []


def _original(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node of the original that `node` of the narrow graph stands for, or that feeds it."""
    names: dict[str, fx.Node] = {n.name: n for n in graph.graph.nodes}
    while node.name not in names:
        node = node.all_input_nodes[0]
    return names[node.name]


def _pin_around(walked: Walk, misfit: fx.Node, pinned: set[fx.Node], many: int) -> None:
    """Pin a node that does not fit; if that has been tried, the nearest `many` that feed it. Where
    none is left the whole network is kept."""
    nodes, seen, found = [misfit], {misfit}, 0
    for node in nodes:
        if node not in pinned:
            pinned.add(node)
            found += _pin(walked, node)
            if found == many:
                return
        new = [n for n in node.all_input_nodes if n not in seen]
        nodes += new
        seen.update(new)
    if not found:
        site = Site(str(misfit.target), misfit.name, misfit.meta.get("source"))
        everything = torch.arange(1, walked.system.atoms)
        if walked.system.is_fixed(everything):
            raise DempError(f"the plan does not fit node {misfit.name!r}, whatever is kept there")
        walked.system.pin(everything, "no plan was found that fits its code", site)


def _pin(walked: Walk, node: fx.Node) -> bool:
    """Keep every channel that goes into or comes out of a node; whether there are any."""
    site = Site(str(node.target), node.name, node.meta.get("source"))
    pinned = len(walked.system.pins)
    nodes = [node]
    for n in nodes:  # up to the tensors that feed it, through sizes and lists
        value = walked.env.get(n)
        if n is node or not isinstance(value, Tensor):
            nodes += [i for i in n.all_input_nodes if i not in nodes]
        for label in walked.value(value).labels if isinstance(value, Tensor) else ():
            walked.system.pin(label, "its code does not take another size", site)
    for edge in walked.system.edges:
        if edge.consumer == node.name:
            walked.system.pin(edge.target, "its code does not take another size", site)
    return len(walked.system.pins) > pinned
