"""How much of a network could go at most, found by running it: nothing of demp_fx is used here.

The network is run in float64 on several inputs: two resolutions, eval and train mode. In each run
every channel of every layer is looked at from both sides:

1. *Known.* A channel of an input or output is known if it holds one and the same number at every
   position of every sample, in every run. In another mode or at another resolution another number
   (batch statistics; the border of a padded constant) is not known: no narrower module is right
   in all of them.
2. *Heard.* A channel of an output is heard if the gradient of a random projection of the network's
   outputs with respect to it is not exactly zero, in some run.

A channel is alive at an output if it is heard and not known; at an input if it is not known.
What a layer needs at most is the weights between its alive inputs and outputs. A layer that works
channel by channel (BatchNorm, depthwise convolution) needs those of its alive outputs.

Chance must not pass for death: a ReLU may stay shut on every sample by accident. So, unless the
question is what goes on *this data* (`observed`), what is not known is made arbitrary: the output
of a layer is replaced by noise wherever it varies, its gradient passed straight through. Known
numbers and exact zeros are all that travels unchanged.

Where a constant that is not zero enters a layer with zero padding, one input channel has to stay
to stand for all of them (a carrier): at the border they cannot be folded into a bias.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

SAME = 1e-9  # two values this close are one constant; exact zeros are compared exactly
Layer = _ConvNd | nn.Linear | _BatchNorm


@dataclass
class Bound:
    """Parameters in all, and how many of them any exact narrower network must keep at least."""

    total: int
    kept: dict[str, int] = field(default_factory=dict)

    @property
    def removable(self) -> int:
        """At most so many parameters can go."""
        return self.total - sum(self.kept.values())


def removable(model: nn.Module, inputs: list[Tensor], observed: bool = False) -> Bound:
    """The bound for a float64 model, over these inputs in eval and train mode.

    With `observed` the inputs are the data that counts: what never fires on them is dead.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Layer)}
    views = {name: _View(layer) for name, layer in layers.items()}
    torch.manual_seed(1)
    for train in (False, True):
        for x in inputs:
            model.train(train)
            with _watched(layers, views, substitute=not observed):
                result = model(x)
                (result * torch.randn_like(result)).sum().backward()
    bound = Bound(total=sum(p.numel() for p in model.parameters()))
    for name, layer in layers.items():
        bound.kept[name] = views[name].needed(layer, observed)
    return bound


class _View:
    """What all runs together say about one layer's channels."""

    def __init__(self, layer: Layer) -> None:
        self.inputs = _Known()
        self.outputs = _Known()
        self.heard: Tensor | None = None
        self.channel_axis = -1 if isinstance(layer, nn.Linear) else 1

    def hear(self, gradient: Tensor) -> None:
        heard = (_channels_first(gradient, self.channel_axis) != 0).any(dim=1)
        self.heard = heard if self.heard is None else self.heard | heard

    def needed(self, layer: Layer, observed: bool) -> int:
        """The parameters between alive inputs and alive outputs."""
        if self.heard is None:  # the layer never ran, or nothing of what it gives is used
            return 0
        alive = self.heard & ~self.outputs.known
        kernels = layer.weight.detach()[alive]  # (alive outputs, inputs, ...)
        shift = 0 if layer.bias is None else 1
        if isinstance(layer, _BatchNorm) or getattr(layer, "groups", 1) > 1:
            return kernels.numel() + shift * len(kernels)
        silent = self.inputs.zero if observed else self.inputs.known
        read = (kernels.transpose(0, 1).flatten(1) != 0).any(dim=1) & ~silent
        needed = kernels[:, read].numel() + shift * len(kernels)
        if _pads_with_zeros(layer) and bool((silent & ~self.inputs.zero).any()):
            needed += kernels[:, 0].numel()  # the carrier
        return needed


class _Known:
    """Which channels of a tensor held one and the same number in every run, and which held 0."""

    def __init__(self) -> None:
        self.known: Tensor | None = None
        self.value: Tensor | None = None

    def see(self, per_channel: Tensor) -> Tensor:
        """Add a run's values, (channels, positions); which of them vary in this run."""
        low, high = per_channel.amin(dim=1), per_channel.amax(dim=1)
        varies = high - low > SAME * high.abs().clamp(min=1)
        if self.known is None or self.value is None:
            self.known, self.value = ~varies, low
        else:
            moved = (low - self.value).abs() > SAME * low.abs().clamp(min=1)
            self.known = self.known & ~varies & ~moved
        return varies

    @property
    def zero(self) -> Tensor:
        return self.known & (self.value == 0)


@contextmanager
def _watched(layers: dict[str, Layer], views: dict[str, _View], substitute: bool) -> Iterator[None]:
    """While open, every layer shows its view what goes in, what comes out and what is heard."""
    handles = [
        layer.register_forward_hook(_watcher(views[name], substitute))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watcher(view: _View, substitute: bool) -> Callable[..., Tensor]:
    def hook(_layer: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> Tensor:
        axis = view.channel_axis
        view.inputs.see(_channels_first(arguments[0].detach(), axis))
        varies = view.outputs.see(_channels_first(result.detach(), axis))
        result.register_hook(view.hear)
        if not substitute:
            return result.clone()  # an in-place activation after it must not touch what was heard
        shape = [1] * result.dim()
        shape[axis] = -1
        noise = torch.randn_like(result)
        return result + torch.where(varies.view(shape), noise - result, 0.0).detach()

    return hook


def _channels_first(x: Tensor, axis: int) -> Tensor:
    x = x.movedim(axis, 0)
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _pads_with_zeros(layer: Layer) -> bool:
    return isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and any(layer.padding)
