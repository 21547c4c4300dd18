"""Layers of neurons: the activations of a graph, and the parameters that make each channel.

A neuron is an output channel of a convolution, or a unit of a linear layer, seen behind its
activation; behind a residual sum, after the sum and its activation. Its parameters are the filters,
biases, scales and shifts that end in this channel before any other activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from demp_fx.channels.analysis import walk
from demp_fx.channels.classes import classes
from demp_fx.channels.labels import varying
from demp_fx.channels.walk import Walk
from demp_fx.nodes.watch import Test
from demp_fx.passes.twin import without_numbers
from demp_fx.turns import in_turn

_SATURATING = ("tanh", "hardtanh", "softsign")
_RECTIFYING = ("relu", "relu6", "threshold", "hardsigmoid", "sigmoid")  # never below zero
_ACTIVATIONS = (
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
    "softplus", "sigmoid", "hardsigmoid", "hardswish", "logsigmoid", "threshold", *_SATURATING,
)  # fmt: skip
_MODULES: dict[type[nn.Module], str] = {
    kind: kind.__name__.lower()
    for kind in (
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
        nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, nn.LogSigmoid,
        nn.Threshold, nn.Tanh, nn.Hardtanh, nn.Softsign,
    )
}  # fmt: skip
_FUNCTIONS = {
    getattr(home, name + suffix): name
    for name in _ACTIVATIONS
    for suffix in ("", "_")
    for home in (F, torch)
    if hasattr(home, name + suffix)
}


@dataclass(frozen=True)
class Part:
    """A parameter of a layer of neurons: index i of `dim` belongs to neuron `channel[i]`, or to
    none (-1)."""

    parameter: str
    dim: int
    channel: Tensor

    @property
    def layer(self) -> str:
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Neurons:
    """A layer of neurons: the node of its activation, the dim of the channels, and its parts."""

    node: str
    dim: int
    width: int
    test: Test
    in_place: bool
    parts: tuple[Part, ...]

    def narrowed(self, kept: Tensor, keep: Mapping[str, Mapping[int, list[int]]]) -> Neurons:
        """The layer in a narrower network; `kept`: its channels (bool), `keep`: as in a plan."""
        place = torch.where(kept, kept.cumsum(0) - 1, -1)
        parts = []
        for part in self.parts:
            index = keep.get(part.parameter, {}).get(part.dim)
            old = part.channel if index is None else part.channel[index]
            parts.append(replace(part, channel=torch.where(old >= 0, place[old], -1)))
        return replace(self, width=int(kept.sum()), parts=tuple(parts))


@in_turn
def neurons(graph: fx.GraphModule, walked: Walk | None = None) -> list[Neurons]:
    """Every layer of neurons of a traced module, in the order of execution.

    `walked`: a walk over the graph with facts, if there is one already.
    """
    walked = walked or walk(without_numbers(graph))
    root = classes(walked.system)
    found = list(_activations(walked, root))
    heads = {node: root[label_along(walked, node, dim)] for node, _, dim in found}
    own = torch.zeros(walked.system.atoms, dtype=torch.bool)
    for atoms in heads.values():
        own[atoms] = True
    own[0] = False
    return [
        Neurons(
            node=node.name, dim=dim, width=heads[node].numel(),
            test=_test(kind),
            in_place=_in_place(walked.graph, node),
            parts=tuple(_parts(walked, root, heads[node], own)),
        )
        for node, kind, dim in found
    ]  # fmt: skip


def label_along(walked: Walk, node: fx.Node, dim: int) -> Tensor:
    """The atoms that a node's value carries along `dim`, and along no other."""
    labels = walked.value(walked.env[node]).labels
    return next(label.reshape(-1) for label in labels if varying(label) == (dim,))


def _activations(walked: Walk, root: Tensor) -> Iterator[tuple[fx.Node, str, int]]:
    """Every activation with one axis of channels that may go: its node, its kind, the dim."""
    pinned = torch.zeros(walked.system.atoms, dtype=torch.bool)
    for pin in walked.system.pins:
        pinned[root[pin.atoms]] = True
    for edge in reversed(walked.system.edges):  # what has to arrive has to set out
        pinned[root[edge.source[pinned[root[edge.target]]]]] = True
    for node, value in walked.env.items():
        kind = _kind(walked.graph, node)
        if kind is None or not isinstance(value, Tensor):
            continue
        labels = walked.value(value).labels
        free = [label for label in labels if not bool(pinned[root[label]].all())]
        if len(free) == 1 and len(varying(free[0])) == 1 and bool((free[0] > 0).all()):
            yield node, kind, varying(free[0])[0]


def _kind(graph: fx.GraphModule, node: fx.Node) -> str | None:
    """The name of the activation that a node computes, if it is one."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        limits = (getattr(module, "min_val", -1), getattr(module, "max_val", 1))
        return _MODULES.get(type(module)) if limits == (-1, 1) else "relu6"
    if node.op == "call_function" and not isinstance(node.target, str):
        return _FUNCTIONS.get(node.target)
    name = str(node.target).removesuffix("_")
    return name if node.op == "call_method" and name in _ACTIVATIONS else None


def _test(kind: str) -> Test:
    """The death test that suits an activation."""
    if kind in _SATURATING:
        return "two-sided"
    return "one-sided" if kind in _RECTIFYING else "silent"


def _in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an activation overwrites its input."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).endswith("_") or bool(node.kwargs.get("inplace", False)) or any(
        a is True for a in node.args[1:]
    )  # fmt: skip


def _parts(walked: Walk, root: Tensor, head: Tensor, own: Tensor) -> Iterator[Part]:
    """The parameters whose filters carry the atoms of `head`, or arrive in it over residual sums.

    `own`: the atoms behind activations, where the search ends.
    """
    channel = torch.full((walked.system.atoms,), -1)
    channel[head] = torch.arange(head.numel())
    for edge in reversed(walked.system.edges):
        source, target = root[edge.source], channel[root[edge.target]]
        free = (target >= 0) & ~own[source] & (channel[source] < 0)
        if edge.kind == "sum":
            channel[source[free]] = target[free]
    channel[0] = -1
    read = {(r.fold.weight, r.fold.dim) for r in walked.system.reads if r.fold is not None}
    held = {name for name, _ in walked.graph.named_parameters()}
    for axis in walked.system.axes:
        if axis.owner in held and axis.dim >= 0 and (axis.owner, axis.dim) not in read:
            found = channel[root[axis.atoms]]
            if bool((found >= 0).any()):
                yield Part(axis.owner, axis.dim, found)


Takes = Callable[[str], bool]


def select(found: list[Neurons], takes: Takes) -> list[Neurons]:
    """The layers all of whose parts belong to layers that take part; those without parts go."""
    return [n for n in found if n.parts and all(takes(p.layer) for p in n.parts)]


def scale_of(module: nn.Module, kinds: tuple[type[Any], ...]) -> bool:
    """Whether a module is a normalisation of one of these kinds, with a scale to train."""
    weight = getattr(module, "weight", None)
    return isinstance(module, kinds) and isinstance(weight, nn.Parameter) and weight.requires_grad
