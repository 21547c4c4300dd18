"""The network around the groups: which node of the fx graph carries channels of which group."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from demp_fx.calls import called
from demp_fx.channels.dependencies import DependencyGraph
from demp_fx.channels.groups import Node
from demp_fx.channels.places import SUMS
from demp_fx.channels.walk import Walk
from demp_fx.trees import tensors_of

CATS = {torch.cat, torch.concat, torch.concatenate, torch.ops.aten.cat.default}


def network(walk: Walk, deps: DependencyGraph) -> list[Node]:
    """The nodes on the way from the inputs to the outputs, in order of execution.

    Left out: parameters, sizes, and what is computed of them alone.
    """
    shown: dict[fx.Node, Node] = {}
    found: dict[fx.Node, list[str]] = {}  # the shown nodes whose values a node takes
    for node in walk.graph.graph.nodes:
        sources = list(dict.fromkeys(s for n in node.all_input_nodes for s in found[n]))
        tensors = tensors_of(walk.env.get(node))
        start = node.op == "placeholder" and bool(tensors)
        if start or node.op == "output" or (sources and tensors and node.op != "get_attr"):
            shown[node] = _node(walk, deps, node, sources, tensors)
            found[node] = [node.name]
        else:
            found[node] = sources if tensors else []
    return list(shown.values())


def _node(
    walk: Walk, deps: DependencyGraph, node: fx.Node, inputs: list[str], tensors: list[Tensor]
) -> Node:
    groups: dict[int, int] = {}
    for tensor in tensors:
        for label in walk.value(tensor).labels:
            for group, count in deps.groups_in(label).items():
                groups[group] = max(groups.get(group, 0), count)
    joins = "concat" if node.target in CATS else ""
    if called(node) in SUMS and len(inputs) > 1:
        joins = "sum"
    return Node(
        name=node.name, kind=_kind(walk.graph, node), module=_module(node), inputs=inputs,
        joins=joins, shape=list(tensors[0].shape) if tensors else [], groups=groups,
        source=node.meta.get("source"),
    )  # fmt: skip


def _kind(graph: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return str(getattr(node.target, "__name__", node.target))


def _module(node: fx.Node) -> str:
    """The name of the submodule that a node calls, or whose forward it is in."""
    if node.op == "call_module":
        return str(node.target)
    path: str = node.meta.get("module", ("", ""))[0]
    return path
