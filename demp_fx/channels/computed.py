"""Values that depend on nothing that a forward is given, worked out for real."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from demp_fx.calls import perform
from demp_fx.tracing.states import written_among
from demp_fx.trees import tensors_of

NOTHING: Mapping[fx.Node, Any] = MappingProxyType({})


def computed(
    node: fx.Node,
    graph: fx.GraphModule,
    known: dict[fx.Node, Any],
    sizes: Mapping[fx.Node, Any] = NOTHING,
) -> Any:
    """The value of a node that depends on no input, or on the inputs' `sizes` alone: what among
    these is no tensor is taken as it is. Parameters and buffers have to have their numbers.
    """
    if node not in known:
        if node in sizes and not tensors_of(sizes[node]):
            meta = isinstance(sizes[node], torch.device)  # where there are no numbers
            return torch.device("cpu") if meta else sizes[node]
        if node.op == "placeholder":
            raise ValueError(f"{node.name} is an input")
        for n in node.all_input_nodes:
            known[n] = computed(n, graph, known, sizes)
        if node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(graph)
        else:
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = perform(node, graph, args, kwargs)
    return known[node]


def numbers_in(
    entered: Mapping[fx.Node, Any], graph: fx.GraphModule, sizes: Mapping[fx.Node, Any]
) -> dict[fx.Node, int]:
    """What single whole numbers are in the tensors among those that have `entered` a node: how much
    is padded, say, where code keeps strides in buffers."""
    found: dict[fx.Node, int] = {}
    for n, t in entered.items():
        if isinstance(t, Tensor) and t.is_meta and not t.dim() and not t.is_floating_point():
            known: dict[fx.Node, Any] = {}
            try:
                number = computed(n, graph, known, sizes).item()
            except Exception:
                continue
            held = {str(k.target) for k in known if k.op == "get_attr"}
            if not written_among(graph.graph, held):  # a counter has another one at the next call
                found[n] = number
    return found
