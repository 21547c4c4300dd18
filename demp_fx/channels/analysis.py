"""Analysis of a traced graph: the walk with its table of rules, and the dependency graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from demp_fx.channels.cuts import decide
from demp_fx.channels.dependencies import DependencyGraph
from demp_fx.channels.facts import Facts
from demp_fx.channels.rules import SHAPES, rule_of
from demp_fx.channels.walk import Walk
from demp_fx.errors import UsageError
from demp_fx.inputs import Inputs


def walk_of(
    graph: fx.GraphModule,
    observed: Mapping[str, tuple[int, Facts]] | None = None,
    with_facts: bool = True,
) -> Walk:
    """A walk over `graph`, ready to run; `observed`: what calibration saw, by node."""
    return Walk(graph, rule_of, SHAPES, observed or {}, with_facts)


def analyze(graph: fx.GraphModule) -> DependencyGraph:
    """The pruning groups of a traced module: what is coupled, what is pinned, where and why.

    Raises `UsageError` for a graph that does not come from `demp_fx.trace`.
    """
    example = graph.meta.get("example_inputs")
    if not isinstance(example, Inputs):
        raise UsageError("analyze takes what demp_fx.trace(model, example_inputs) returns")
    walk = walk_of(graph)
    walk.run(example)
    return DependencyGraph(walk.system, decide(walk.system), set(walk.params))


