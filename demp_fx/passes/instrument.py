"""Insert noise, penalty and watch nodes into a traced module: anyone sees them in its table.

    conv1 -> demp.bn1_penalty(., bn1.weight, demp.strength) -> bn1
          -> demp.relu_noise -> relu -> demp.relu_watch

They are identities; in eval mode nothing but a call each. `strip` takes them out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from demp_fx.nodes.noise import Noise
from demp_fx.nodes.penalty import Penalty
from demp_fx.nodes.watch import Watch
from demp_fx.passes.neurons import Neurons, neurons, scale_of, select
from demp_fx.recipe import Recipe
from demp_fx.tracing.module import TracedModule, assemble

HOME = "demp"  # the submodule that holds what the inserted nodes run
STRENGTH = "strength"

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_ALL_NORMS = (*_NORMS, nn.LayerNorm, nn.RMSNorm)


def instrument(
    graph: fx.GraphModule, recipe: Recipe, layers: Sequence[Neurons] | None = None,
    penalised: Sequence[str] | None = None,
) -> TracedModule:  # fmt: skip
    """A traced module with nodes inserted as the recipe says; it shares all parameters.

    `layers`, `penalised`: where they are known already, the layers of neurons to instrument, and
    the parameters under the penalty. Otherwise they are looked for in the graph.
    """
    if layers is None:
        layers = select(neurons(graph), recipe.takes)
    if penalised is None:
        penalised = to_penalise(graph, recipe, layers)
    home = nn.Module()
    floats = [p.dtype for p in graph.parameters() if p.is_floating_point()]
    fine = torch.promote_types(floats[0] if floats else torch.float32, torch.float32)
    home.register_buffer(STRENGTH, torch.zeros((), dtype=fine), persistent=False)
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        copies[node] = new.node_copy(node, copies.__getitem__)
    new._codegen = graph.graph._codegen
    named = {node.name: copies[node] for node in graph.graph.nodes}
    for layer in layers:
        if layer.node in named:
            _watch(new, named[layer.node], layer, recipe, home)
            _noise(new, named[layer.node], layer, graph, home)
    _penalties(new, penalised, graph, home)
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    home.to(device)
    home.train(graph.training)
    module = assemble(_with(graph, home), new, type(graph).__name__)
    module.meta = dict(graph.meta)
    return module


def to_penalise(graph: fx.GraphModule, recipe: Recipe, layers: Sequence[Neurons]) -> list[str]:
    """The names of the parameters that the penalty is on."""
    if recipe.penalty == 0 and recipe.target is None:
        return []
    norms = _ALL_NORMS if recipe.penalise == "scales" else _NORMS
    modules = dict(graph.named_modules())
    scales = [f"{name}.weight" for name, m in modules.items()
              if scale_of(m, norms) and recipe.takes(name)]  # fmt: skip
    if recipe.penalise == "scales":
        return scales
    shapes = {n: p.dim() for n, p in graph.named_parameters() if p.requires_grad}
    weights: dict[str, None] = {}
    for layer in layers:
        names = [part.parameter for part in layer.parts]
        if recipe.penalise == "weights" or not set(names) & set(scales):
            weights |= dict.fromkeys(n for n in names if shapes.get(n, 0) > 1)
    return list(weights) if recipe.penalise == "weights" else [*scales, *weights]


def _with(graph: fx.GraphModule, home: nn.Module) -> nn.Module:
    """A root that holds all that `graph` does, and the home of the inserted nodes."""
    root = nn.Module()
    root._parameters = dict(graph._parameters)
    root._buffers = dict(graph._buffers)
    root._modules = {**graph._modules, HOME: home}
    root._non_persistent_buffers_set = set(graph._non_persistent_buffers_set)
    root.training = graph.training
    return root


def _add(home: nn.Module, name: str, module: nn.Module) -> str:
    home.add_module(name, module)
    return f"{HOME}.{name}"


def _watch(graph: fx.Graph, node: fx.Node, layer: Neurons, recipe: Recipe, home: nn.Module) -> None:
    test = layer.test if recipe.death_test == "auto" else recipe.death_test
    target = _add(home, f"{node.name}_watch", Watch(layer.dim, test, recipe.death_threshold))
    with graph.inserting_after(node):
        watch = graph.call_module(target, (node,))
    node.replace_all_uses_with(watch, lambda user: user is not watch)


def _noise(
    graph: fx.Graph, node: fx.Node, layer: Neurons, module: fx.GraphModule, home: nn.Module
) -> None:
    inputs = node.all_input_nodes
    if layer.in_place and len(inputs[0].users) > 1:
        return  # others read what the activation writes: a copy would be another value
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    noise = Noise(layer.width, layer.dim, layer.in_place, device)
    target = _add(home, f"{node.name}_noise", noise)
    with graph.inserting_before(node):
        before = graph.call_module(target, (inputs[0],))
    node.replace_input_with(inputs[0], before)


def _penalties(
    graph: fx.Graph, penalised: Sequence[str], module: fx.GraphModule, home: nn.Module
) -> None:
    """A node in front of the first use of each parameter; of one used bare, on itself."""
    waiting = dict.fromkeys(penalised)
    strength: fx.Node | None = None
    for node in list(graph.nodes):
        for name in [n for n in waiting if node.target in (n, n.rpartition(".")[0])]:
            bare = node.op == "get_attr" and node.target == name
            if not (bare or (node.op == "call_module" and node.args)):
                continue
            del waiting[name]
            if strength is None:
                first = next(n for n in graph.nodes if n.op != "placeholder")
                with graph.inserting_before(first):
                    strength = graph.get_attr(f"{HOME}.{STRENGTH}")
            place = name.removesuffix(".weight").replace(".", "_")
            target = _add(home, f"{place}_penalty", Penalty())
            _penalise(graph, node, name, target, strength, bare)


def _penalise(
    graph: fx.Graph, node: fx.Node, name: str, target: str, strength: fx.Node, bare: bool
) -> None:
    if bare:
        with graph.inserting_after(strength if strength.prev is node else node):
            pulled = graph.call_module(target, (node, node, strength))
        node.replace_all_uses_with(pulled, lambda user: user is not pulled)
        return
    before: Any = node.args[0]
    with graph.inserting_before(node):
        parameter = graph.get_attr(name)
        pulled = graph.call_module(target, (before, parameter, strength))
    node.args = (pulled, *node.args[1:])
