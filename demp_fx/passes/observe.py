"""The death test on data: which channels never fired on the calibration inputs.

A channel is dead in a batch if its activation is at most `threshold` everywhere in it, and dead if
it is so in all batches (paper, section 2: for ReLU, whose sum is zero iff it never fired, the two
are the same). Dropout is off; batch norm leaves its running statistics alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from demp_fx.channels.analysis import walk
from demp_fx.channels.facts import Facts
from demp_fx.errors import UsageError
from demp_fx.inputs import Inputs
from demp_fx.passes.still import Still
from demp_fx.tracing.source import first_line
from demp_fx.turns import default_device, in_turn

_GROUPS = (tuple, list, Mapping)


def activations(graph: fx.GraphModule) -> dict[str, int]:
    """The nodes to watch: elementwise functions of one value with a channel axis, by name."""
    return walk(graph, with_facts=False).activations


class _Watch(fx.Interpreter):
    """Run a graph and keep, at each watched node, the largest magnitude of every channel."""

    def __init__(self, graph: fx.GraphModule, dims: Mapping[str, int]) -> None:
        super().__init__(graph)
        self.dims = dims
        self.peaks: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.name in self.dims and isinstance(out, Tensor) and out.is_floating_point():
            rest = [d for d in range(out.dim()) if d != self.dims[n.name]]
            peak = out.detach().abs().amax(rest)
            seen = self.peaks.get(n.name)
            self.peaks[n.name] = peak if seen is None else torch.maximum(seen, peak)
        return out


def batches(calibration: Iterable[Any], graph: fx.GraphModule) -> Iterator[Inputs]:
    """What `graph` takes of each batch, which is a tensor, a tuple or a dict of its arguments, or a
    pair of that and a target. What is behind or beside its arguments is left out, batches without
    a sample are passed over.

    Raises `UsageError` for batches that lack an argument, or are not like the example inputs.
    """
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    example = _by_name(graph.meta["example_inputs"], names)
    try:
        found = iter(calibration)
    except TypeError as error:
        kind = type(calibration).__name__
        raise UsageError(f"calibration is to be an iterable of batches, not a {kind}") from error
    for each in found:
        batch = Inputs.of(_without_target(each, list(example.values())))
        given = _by_name(batch, names)
        for name, argument in example.items():
            _check(name, argument, given.get(name))
        whole, args = example | given, batch.args[: len(names)]
        rest = {name: whole[name] for name in names[len(args) :] if name in whole}
        inputs = Inputs(args, rest).map(lambda t: t.to(device))
        if samples_in(inputs):
            yield inputs


def _by_name(inputs: Inputs, names: list[str]) -> dict[str, Any]:
    return dict(zip(names, inputs.args, strict=False)) | inputs.kwargs


def _without_target(batch: Any, example: list[Any]) -> Any:
    """The inputs of a pair (inputs, target): all other pairs are two arguments."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return batch
    grouped = isinstance(batch[0], _GROUPS) and not any(isinstance(e, _GROUPS) for e in example[:1])
    return batch[0] if grouped or len(example) == 1 else batch


def _check(name: str, example: Any, given: Any) -> None:
    """That the argument called `name` is like that of the example."""
    if not isinstance(example, Tensor):
        return
    if given is None:
        raise UsageError(f"the calibration data lacks {name!r}, which the example inputs have")
    if not isinstance(given, Tensor):
        raise UsageError(f"the calibration data has no tensor as {name!r}: {type(given).__name__}")
    if given.dim() != example.dim():
        raise UsageError(
            f"the calibration data has {name!r} of shape {tuple(given.shape)}, the example inputs "
            f"of {tuple(example.shape)}: it is to be an iterable of batches"
        )


def samples_in(inputs: Inputs) -> int:
    """How many samples a batch has."""
    return inputs.tensors[0].shape[0] if inputs.tensors and inputs.tensors[0].dim() else 1


@contextmanager
def taken(inputs: Inputs) -> Iterator[None]:
    """Meanwhile what goes wrong is said of these `inputs`."""
    try:
        with default_device():
            yield
    except Exception as error:
        shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs.tensors)
        raise UsageError(
            f"the model does not take the calibration data ({shapes}): {first_line(error)}"
        ) from error


@in_turn
def observe(
    graph: fx.GraphModule, calibration: Iterable[Any], dims: Mapping[str, int],
    modes: tuple[bool, ...] = (False,), threshold: float = 0.0,
) -> tuple[dict[str, tuple[int, Facts]], int]:  # fmt: skip
    """Watch the nodes in `dims` (name -> channel dim) on every batch.

    `modes`: the values of `training` to test in; a channel is dead only if it is so in all of them.
    Returns facts by node, and the number of samples seen. Raises `UsageError` without any batch.
    """
    watch, samples = _Watch(graph, dims), 0
    for inputs in batches(calibration, graph):
        samples += samples_in(inputs)
        for training in modes:
            with taken(inputs), probing(graph, training), torch.no_grad(), Still():
                watch.run(*_ordered(graph, inputs))
    if samples == 0:
        raise UsageError("the calibration data is empty: the death test needs at least one batch")
    facts = {}
    for name, peak in watch.peaks.items():
        dead = (peak <= threshold).cpu()
        found = Facts.of(dead, torch.zeros(2, dead.numel(), dtype=torch.float64))
        if found is not None:
            facts[name] = (dims[name], found)
    return facts, samples


def _ordered(graph: fx.GraphModule, inputs: Inputs) -> list[Any]:
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    args = list(inputs.args)
    return args + [inputs.kwargs[n] for n in names[len(args) :] if n in inputs.kwargs]


@contextmanager
def probing(module: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode, batch statistics not recorded; put back as it was afterwards."""
    modules = list(module.modules())
    before = [(m, m.training, getattr(m, "momentum", None)) for m in modules]
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._NormBase)]
    counts = [None if m.num_batches_tracked is None else m.num_batches_tracked.clone()
              for m in norms]  # fmt: skip
    try:
        module.train(training)
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for m, mode, momentum in before:
            m.training = mode
            if isinstance(m, nn.modules.batchnorm._NormBase):
                m.momentum = momentum
        for norm, count in zip(norms, counts, strict=True):
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
