"""The same network and the same dead channels given to Torch-Pruning as its pruning request.

It groups what has to be cut together (`DependencyGraph.get_all_groups`). Of each group those
channels are requested that are dead in all of its layers that give them: killed there, or followed
by what was, so that no gradient reaches them. A dead scale of a layer norm kills no channel of the
stream before it, and asks for nothing. So no living channel is asked for by this side; what comes
out is compared with the original like ours.

That leaves out how it finds what to cut, which takes demp_fx half of its time. So its own pruner is
timed as well, as its documentation begins: half of the channels, by the norm of their groups.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from benchmarks.zoo.networks import Network, call, in_float64
from benchmarks.zoo.ours import half_dead
from benchmarks.zoo.outputs import leaves, numbers, one_line, parameters, relative_error, trains

Layer = nn.Linear | _ConvNd | _BatchNorm
Dead = dict[nn.Module, set[int]]


def measure(network: Network, constant: bool, send: Callable[[dict[str, Any]], None]) -> None:
    """Send what is found, as it is found."""
    model, inputs, deaths = half_dead(network, constant)
    before = parameters(model)
    torch.manual_seed(1)
    x = in_float64(network.inputs(3, 1))
    expected = numbers(model.double(), x, False)  # float32 and back: no digit is lost
    model.float().eval()
    dead, usual = _dead(model, inputs, deaths), network.usual()
    killed = {model.get_submodule(name) for name in deaths}
    try:
        seconds = _timed(lambda: prune(model, usual, dead, killed))
        narrow = model.double()
        send({"eval_error": relative_error(numbers(narrow, x, False), expected)})
        send({"seconds": seconds, "removed": before - parameters(narrow)})
        send({"backward": trains(narrow, x)})
    except Exception as error:
        send({"error": one_line(error)})


def measure_pruner(
    network: Network, constant: bool, send: Callable[[dict[str, Any]], None]
) -> None:
    """The same for its own pruner: its time alone, if what it gives runs."""
    model, _, _ = half_dead(network, constant)
    x, usual = in_float64(network.inputs(3, 1)), network.usual()
    try:
        seconds = _timed(lambda: prune_half(model, usual))
        numbers(model.double(), x, False)
        send({"seconds": seconds})
    except Exception as error:
        send({"error": one_line(error)})


def _timed(work: Callable[[], None]) -> float:
    """Its seconds of CPU."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
        return time.process_time() - start
    finally:
        gc.enable()


def prune_half(model: nn.Module, inputs: Any) -> None:
    """Its own pruner, as documented; what makes the classes stays."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    layers = layers or [m for m in model.modules() if isinstance(m, _ConvNd)]
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=layers[-1:],
    )
    pruner.step()


def prune(model: nn.Module, inputs: Any, dead: Dead, killed: set[nn.Module]) -> None:
    """Build the dependency graph, and cut the dead of each group with a killed layer, in place."""
    graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    requests = []  # all of them first: cutting renumbers what reads a concat
    for group in graph.get_all_groups():
        if not any(item.dep.target.module in killed for item in group):
            continue  # no gradient may be chance there, behind a ReLU that is shut
        chosen: set[int] | None = None
        for item in group:
            layer = item.dep.target.module
            if layer not in dead or not graph.is_out_channel_pruning_fn(item.dep.handler):
                continue
            pairs = list(zip(item.idxs, item.root_idxs, strict=True))
            alive = {root for index, root in pairs if index not in dead[layer]}
            own = {root for _, root in pairs} - alive
            chosen = own if chosen is None else chosen & own
        chosen = _alike(group, chosen or set())
        if chosen:
            requests.append((group[0].dep, sorted(chosen)))
    for root, indices in requests:
        asked = graph.get_pruning_group(root.target.module, root.handler, indices)
        if graph.check_pruning_group(asked):
            asked.prune()


def _alike(group: Any, chosen: set[int]) -> set[int]:
    """Those that are chosen in every group of a grouped convolution: its own pruners, too, ask for
    the same ones in each."""
    layers = [item.dep.target.module for item in group]
    grouped = [c for c in layers if isinstance(c, _ConvNd) and 1 < c.groups < c.out_channels]
    if not grouped:
        return chosen
    size = len(group[0].idxs) // max(c.groups for c in grouped)
    starts = range(0, len(group[0].idxs), size)
    return {i for i in chosen if all(start + i % size in chosen for start in starts)}


def _dead(model: nn.Module, inputs: Any, deaths: dict[str, Tensor]) -> Dead:
    """The dead output channels of every layer that has any say."""
    sum(t.square().mean() for t in leaves(call(model, inputs))).backward()
    found: Dead = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, Layer):
            continue
        if name in deaths:
            found[layer] = set(deaths[name].tolist())
        elif not isinstance(layer, _BatchNorm) and layer.weight.grad is not None:
            rows = (
                layer.weight.grad.transpose(0, 1)
                if getattr(layer, "transposed", False)
                else layer.weight.grad
            )
            found[layer] = set((~rows.flatten(1).any(dim=1)).nonzero().view(-1).tolist())
    model.zero_grad(set_to_none=True)
    return found
