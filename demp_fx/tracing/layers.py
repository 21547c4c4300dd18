"""Calls of torch.nn layers in an exported graph: the ops of one call become the layer again."""

from __future__ import annotations

import inspect
from collections import defaultdict

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from demp_fx.tracing.modes import BY_MODE, kept_modes

SYMBOLIC = {torch.ops.aten.sym_size.int}


def restore_layers(graph: fx.Graph, model: nn.Module) -> None:
    """Replace the ops of each call of a plain torch.nn layer by a `call_module` node.

    It follows train() and eval(), keeps running statistics and reads like the user's model. Only
    layers of one argument and one result are restored; of others the ops stay.
    """
    calls: dict[tuple[str, str], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in SYMBOLIC and "module" in node.meta:
            calls[node.meta["module"]].append(node)
    kept = kept_modes(model)
    for (path, _), nodes in calls.items():
        layer = model.get_submodule(path)
        if is_layer(layer) and not (layer in kept and isinstance(layer, BY_MODE)):
            _restore(graph, path, layer, nodes)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch.nn's own without parts, called with one argument."""
    if not module.__module__.startswith(("torch.nn", "torch.ao.nn")) or module._modules:
        return False
    if is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    return "forward" not in vars(module) and len(inspect.signature(module.forward).parameters) == 1


def _restore(graph: fx.Graph, path: str, layer: nn.Module, nodes: list[fx.Node]) -> None:
    own = set(nodes)
    state = {id(t) for t in [*layer.parameters(), *layer.buffers()]}
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
    given = [
        n
        for n in inputs
        if n not in own
        and isinstance(n.meta.get("val"), Tensor)
        and not (n.op == "get_attr" and id(n.meta["attribute"]) in state)
    ]
    results = [n for n in nodes if any(user not in own for user in n.users)]
    if len(given) != 1 or len(results) != 1:
        return
    with graph.inserting_before(results[0]):
        called = graph.call_module(path, (given[0],))
    called.meta = dict(results[0].meta)
    results[0].replace_all_uses_with(called)
    for node in reversed(nodes):
        graph.erase_node(node)
