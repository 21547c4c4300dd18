"""How much of a network could go at most, found by running it: nothing of demp_fx is used here.

The network is run in float64 on several inputs: two resolutions, eval and train mode. In each run
every channel of every layer is looked at from both sides:

1. *Known.* A channel of an input or output is known if it holds one and the same number at every
   position of every sample in every run of a mode, and so in both modes. The two numbers may
   differ: batch statistics turn a constant into the norm's shift, running statistics do not. (What
   the border of a padded constant leaves behind is no such number, and not counted.)
2. *Heard.* A channel of an output is heard if the gradient of a random projection of the network's
   outputs with respect to it is not exactly zero, in some run.

A channel is alive at an output if it is heard and not known; at an input if it is not known and
some alive output reads it. What a layer needs at most is the weights between its alive inputs and
outputs. A layer that works channel by channel (BatchNorm, depthwise convolution) needs those of
its alive outputs.

Chance must not pass for death: a ReLU may stay shut on every sample by accident. So, unless the
question is what goes on *this data* (`observed`), what is not known is made arbitrary: the output
of a layer is replaced by noise wherever it varies, its gradient passed straight through. Known
numbers and exact zeros are all that travels unchanged. On data only zeros count as known, which is
the paper's death test.

Constants that are not zero fold into a bias, unless the layer pads with zeros (at the border they
are missing) or they differ between the modes: then input channels have to stay to stand for all of
them (carriers), as many as the constants have independent directions over the modes.
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


def removable(
    model: nn.Module, inputs: list[Tensor], observed: bool = False, in_training: bool = True
) -> Bound:
    """The bound for a float64 model, over these inputs in eval mode, and in train mode too unless
    not `in_training`.

    With `observed` the inputs are the data that counts: what never fires on them is dead.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Layer)}
    views = {name: _View(layer) for name, layer in layers.items()}
    torch.manual_seed(1)
    for train in (False, True) if in_training else (False,):
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
        columns = int(read.sum()) + (0 if observed else self.inputs.carriers(_pads(layer)))
        return columns * kernels[:, 0].numel() + shift * len(kernels)


class _Known:
    """Which channels of a tensor held one number in every run of a mode, and which number."""

    def __init__(self) -> None:
        self.steady: list[Tensor] = []
        self.first: dict[bool, Tensor] = {}  # by mode

    def see(self, channels: Tensor, train: bool) -> Tensor:
        """Add a run's values, (channels, positions); which channels vary in this run."""
        low, high = channels.amin(dim=1), channels.amax(dim=1)
        near = SAME * high.abs().clamp(min=1)
        first = self.first.setdefault(train, low)
        varies = high - low > near
        self.steady.append(~varies & ((low - first).abs() <= near))
        return varies

    @property
    def known(self) -> Tensor:
        return torch.stack(self.steady).all(dim=0)

    @property
    def zero(self) -> Tensor:
        return self.known & (self._numbers() == 0).all(dim=0)

    def carriers(self, padded: bool) -> int:
        """How many channels must stand for the constants that do not fold into a bias."""
        constants = self._numbers()[:, self.known]
        if padded:
            return int(torch.linalg.matrix_rank(constants)) if constants.numel() else 0
        return int(bool(((constants[0] - constants[-1]).abs() > SAME).any()))

    def _numbers(self) -> Tensor:
        return torch.stack(list(self.first.values()))


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
    def hook(layer: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> Tensor:
        axis = view.channel_axis
        view.inputs.see(_channels_first(arguments[0].detach(), axis), layer.training)
        varies = view.outputs.see(_channels_first(result.detach(), axis), layer.training)
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


def _pads(layer: Layer) -> bool:
    return isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and any(layer.padding)
