"""Analysis of a traced graph: the walk with its table of rules, and the dependency graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from demp_fx.channels.cuts import decide
from demp_fx.channels.dependencies import DependencyGraph
from demp_fx.channels.facts import Facts
from demp_fx.channels.meta import without_collection
from demp_fx.channels.network import network
from demp_fx.channels.rules import rule_of
from demp_fx.channels.walk import Walk
from demp_fx.errors import UsageError
from demp_fx.inputs import Inputs
from demp_fx.shapes import SHAPES
from demp_fx.tracing.values import named_state
from demp_fx.turns import in_turn


@in_turn
def walk(
    graph: fx.GraphModule,
    observed: Mapping[str, tuple[int, Facts]] | None = None,
    with_facts: bool = True,
    labelled: bool = True,
    planned: Mapping[str, Tensor] | None = None,
) -> Walk:
    """Walk over a traced module, on the shapes of its example inputs.

    `observed`: what calibration saw, by node. `with_facts`: also find out what is known of the
    channels. Without `labelled` only shapes and multiplications are found out. `planned`: by
    name, what nodes should give that refuse what they are given, so that all such are found.
    Raises `UsageError` for a graph that is not from `demp_fx.trace`, and where its inputs do not
    run through it.
    """
    example = getattr(graph, "meta", {}).get("example_inputs")
    if not isinstance(example, Inputs):
        raise UsageError("this takes what demp_fx.trace(model, example_inputs) returns")
    found: dict[str, Facts | None] = {}  # what the next call finds where this one writes
    while True:
        done = Walk(
            graph, rule_of, SHAPES, observed or {}, with_facts, labelled, planned or {}, found
        )
        done.run(example)
        less = done.rewritten() if with_facts else {}
        if not less:
            break
        found = found | less
    return done


@in_turn
def analyze(graph: fx.GraphModule) -> DependencyGraph:
    """The pruning groups of a traced module: what is coupled, what is pinned, where and why."""
    with without_collection():
        done = walk(graph)
        deps = DependencyGraph(done.system, decide(done.system), set(done.params))
        deps.nodes = network(done, deps)
        firsts: dict[int, str] = {}
        deps.names |= {name: firsts.setdefault(id(t), name) for name, t in named_state(graph)}
    return deps
