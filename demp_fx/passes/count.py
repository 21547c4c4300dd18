"""Averages over channels of which some were zero, and have gone: divided by how many there were.

With r the part that is left, and m and v mean and variance over it, all channels had mean r m and
variance r v + r (1 - r) m^2; their mean square was r times that of the rest.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from demp_fx.calls import called
from demp_fx.channels.averages import AVERAGES, LAYER_NORMS, MEANS, RMS_NORMS, kind_of
from demp_fx.passes.plan import Count
from demp_fx.passes.sizes import Sizes

Layers = Mapping[str, nn.Module]  # all modules of a graph by name, itself as ""


def counts(layers: Layers, sizes: Sizes) -> list[Count]:
    """The averages that lose zeros, and which part of their channels stays."""
    found = []
    for node in sizes.env:
        kind = kind_of(node, layers)
        if kind not in AVERAGES:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or not isinstance(sizes.env[source], Tensor):
            continue
        rank, ratio = sizes.env[source].dim(), 1.0
        for d in _mean_dims(node, rank) if kind in MEANS else [rank - 1]:
            mask = sizes.seen(node, source).get(d)
            ratio *= 1.0 if mask is None else float(mask.to(torch.float64).mean())
        if ratio < 1.0:
            mask = sizes.seen(node, source).get(rank - 1)
            size = sizes.env[source].size(-1) if mask is None else int(mask.sum())
            found.append(Count(node=node.name, ratio=ratio, size=size))
    return found


def _mean_dims(node: fx.Node, rank: int) -> list[int]:
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if given is None:
        return list(range(rank))
    return [d % rank for d in ([given] if isinstance(given, int) else given)]


def recount(graph: fx.Graph, node: fx.Node, count: Count, layers: Layers) -> fx.Node:
    """Put an average that knows of the zeros in the place of `node`; returns it."""
    kind = kind_of(node, layers)
    with graph.inserting_before(node):
        if kind in LAYER_NORMS:
            new = _layer_norm(graph, node, count.ratio, layers)
        elif kind in RMS_NORMS:
            new = _rms_norm(graph, node, count, layers)
        else:
            mean = graph.node_copy(node)
            new = graph.call_function(operator.mul, (mean, count.ratio))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _layer_norm(graph: fx.Graph, node: fx.Node, r: float, layers: Layers) -> fx.Node:
    x, (weight, bias, eps) = node.args[0], _arguments(graph, node, layers, 1e-5)
    call = graph.call_function
    if weight is not None:  # under autocast, statistics are taken in full precision
        x = graph.call_method("to", (x, call(getattr, (weight, "dtype"))))
    both = call(torch.var_mean, (x,), {"dim": -1, "correction": 0, "keepdim": True})
    var, mean = (call(operator.getitem, (both, k)) for k in (0, 1))
    apart = call(operator.mul, (call(torch.square, (mean,)), r - r * r))
    whole = call(operator.add, (call(operator.mul, (var, r)), apart))
    scale = call(torch.rsqrt, (call(operator.add, (whole, eps)),))
    centred = call(operator.sub, (x, call(operator.mul, (mean, r))))
    new = call(operator.mul, (centred, scale))
    for operation, parameter in ((operator.mul, weight), (operator.add, bias)):
        if parameter is not None:
            new = graph.call_function(operation, (new, parameter))
    return new


def _rms_norm(graph: fx.Graph, node: fx.Node, count: Count, layers: Layers) -> fx.Node:
    x, (weight, _, eps) = node.args[0], _arguments(graph, node, layers, None)
    if eps is None:
        first = next((p for p in layers[""].parameters() if p.is_floating_point()), torch.empty(0))
        eps = torch.finfo(first.dtype).eps
    norm = graph.call_function(F.rms_norm, (x, (count.size,), weight, eps / count.ratio))
    return graph.call_function(operator.mul, (norm, 1 / math.sqrt(count.ratio)))


def _arguments(
    graph: fx.Graph, node: fx.Node, layers: Layers, eps: float | None
) -> tuple[Any, Any, Any]:
    """Scale, shift and eps of a norm, module or function."""
    if node.op == "call_module":
        layer: Any = layers[str(node.target)]
        weight, bias = (
            None if getattr(layer, name, None) is None else graph.get_attr(f"{node.target}.{name}")
            for name in ("weight", "bias")
        )
        return weight, bias, layer.eps
    names: tuple[str, ...] = ("normalized_shape", "weight", "bias", "eps")
    if called(node) in RMS_NORMS:
        names = ("normalized_shape", "weight", "eps")
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    return given.get("weight"), given.get("bias"), given.get("eps", eps)
