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


def batches(calibration: Iterable[Any], device: torch.device) -> Iterator[Inputs]:
    """Inputs of each batch: tensors, argument tuples or dicts; of (input, target) pairs the input.

    A pair whose second entry is a tensor of integers, or of less than two dims, is taken as
    (input, target).
    """
    for batch in calibration:
        if isinstance(batch, (tuple, list)) and len(batch) == 2 and _is_target(batch[1]):
            batch = batch[0]
        yield Inputs.of(batch).map(lambda t: t.to(device))


def _is_target(value: Any) -> bool:
    return isinstance(value, Tensor) and (not value.is_floating_point() or value.dim() < 2)


def observe(
    graph: fx.GraphModule, calibration: Iterable[Any], dims: Mapping[str, int],
    modes: tuple[bool, ...] = (False,), threshold: float = 0.0,
) -> tuple[dict[str, tuple[int, Facts]], int]:  # fmt: skip
    """Watch the nodes in `dims` (name -> channel dim) on every batch.

    `modes`: the values of `training` to test in; a channel is dead only if it is so in all of them.
    Returns facts by node, and the number of samples seen. Raises `UsageError` without any batch.
    """
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    watch, samples = _Watch(graph, dims), 0
    for inputs in batches(calibration, device):
        samples += inputs.tensors[0].shape[0] if inputs.tensors and inputs.tensors[0].dim() else 1
        for training in modes:
            with probing(graph, training), torch.no_grad(), Still():
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
