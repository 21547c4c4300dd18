"""The death test: which neurons are dead on the probe batches, and which of them may go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx

from demp_fx.errors import UsageError
from demp_fx.nodes.watch import Watch
from demp_fx.passes.instrument import HOME
from demp_fx.passes.observe import batches, probing, samples_in, taken
from demp_fx.passes.still import Still


@dataclass(frozen=True)
class Dead:
    """Channels of one layer of neurons: `mask` (bool), and the `level` that they stand at."""

    mask: Tensor
    level: Tensor


def watches(module: fx.GraphModule) -> dict[str, Watch]:
    """The watch nodes of an instrumented module, by the activation that they stand behind."""
    home = module.get_submodule(HOME)
    return {
        name.removesuffix("_watch"): part
        for name, part in home.named_children()
        if isinstance(part, Watch)
    }


def death_test(
    module: fx.GraphModule, calibration: Iterable[Any], modes: tuple[bool, ...],
    limit: int | None = None,
) -> tuple[dict[str, Dead], int]:  # fmt: skip
    """Run the probe batches (the first `limit`) through an instrumented module.

    `modes`: the values of `training` to test in; dead is what is dead in all of them. Running
    statistics, modes and the global random state stay as they were. Returns the dead of each
    layer, on the CPU, and the number of samples seen.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    nodes, samples = watches(module), 0
    for watch in nodes.values():
        watch.start()
    try:
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(cuda), torch.no_grad(), Still():
            for inputs in islice(batches(calibration, module), limit):
                samples += samples_in(inputs)
                for training in modes:
                    with taken(inputs), probing(module, training):
                        module(*inputs.args, **inputs.kwargs)
    finally:
        for watch in nodes.values():
            watch.recording = False
    if samples == 0:
        raise UsageError("the calibration data is empty: the death test needs at least one batch")
    found = {name: Dead(*(t.cpu() for t in watch.stop())) for name, watch in nodes.items()}
    return found, samples


@contextmanager
def held(module: fx.GraphModule, dead: Mapping[str, Dead]) -> Iterator[None]:
    """Meanwhile the channels in `dead` give their level, whatever their inputs are."""
    nodes = watches(module)
    try:
        for name, found in dead.items():
            watch = nodes[name]
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            watch.held = found.mask.to(device), found.level.to(device)
        yield
    finally:
        for watch in nodes.values():
            watch.held = None
