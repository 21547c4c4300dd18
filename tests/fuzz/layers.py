"""Layers and functions that the blocks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.block import Place

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "exp": lambda x: torch.exp(x.clamp(-3, 3)),
    "cos": torch.cos,
    "square": torch.square,
    "relu_": lambda x: F.relu(x, inplace=True),
    "one_minus": lambda x: 1 - x,
    "plus": lambda x: x + 0.5,
    "masked": lambda x: torch.where(x > 0, x, 0.1 * x),
    "filled": lambda x: x.masked_fill(x < -0.5, 0.2),
}
acts = st.sampled_from(["relu", "none", "gelu", "silu", "leaky", "sigmoid"])
widths = st.integers(2, 10)


def divisor(width: int, wanted: int) -> int:
    """The largest divisor of `width` that is at most `wanted`."""
    return next(n for n in range(min(wanted, width), 0, -1) if width % n == 0)


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class ChannelsLast(nn.Module):
    """A layer over the last dim, for feature maps, as in a ConvNeXt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


class ByHand(nn.Module):
    """Layer norm as it is often written out: mean and variance over the channels."""

    def __init__(self, at: Place, centred: bool) -> None:
        super().__init__()
        self.at, self.centred = at, centred
        self.weight = nn.Parameter(torch.ones(at.width))
        self.bias = nn.Parameter(torch.zeros(at.width))

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(self.at.dim, keepdim=True)
        spread = x.pow(2).mean(self.at.dim, keepdim=True)
        x = x * torch.rsqrt(spread + 1e-5)
        return x * self.at.shaped(self.weight) + self.at.shaped(self.bias)


class ResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2."""

    def __init__(self, at: Place) -> None:
        super().__init__()
        self.at = at
        self.gamma = nn.Parameter(torch.ones(at.width))
        self.beta = nn.Parameter(torch.zeros(at.width))

    def forward(self, x: Tensor) -> Tensor:
        space = (1,) if self.at.tokens else tuple(range(2, x.dim()))
        size = x.norm(p=2, dim=space, keepdim=True)
        ratio = size / (size.mean(self.at.dim, keepdim=True) + 1e-3)
        return self.at.shaped(self.gamma) * (x * ratio) + self.at.shaped(self.beta) + x


def _last(at: Place, layer: nn.Module) -> nn.Module:
    return layer if at.tokens else ChannelsLast(layer)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of tokens, whose channels are last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


NORMS: dict[str, Callable[[Place], nn.Module]] = {
    "none": lambda at: nn.Identity(),
    "batch": lambda at: (
        TokenBatchNorm(at.width) if at.tokens else BATCH_NORMS[len(at.space) - 1](at.width)
    ),
    "group": lambda at: (
        nn.LayerNorm(at.width) if at.tokens else nn.GroupNorm(divisor(at.width, 3), at.width)
    ),
    "group_one": lambda at: (
        nn.LayerNorm(at.width, bias=False) if at.tokens else nn.GroupNorm(1, at.width)
    ),
    "instance": lambda at: (
        nn.RMSNorm(at.width)
        if at.tokens
        else INSTANCE_NORMS[len(at.space) - 1](at.width, affine=True)
        if max(at.space) > 1  # torch refuses to normalise a single place
        else nn.Identity()
    ),
    "layer": lambda at: _last(at, nn.LayerNorm(at.width)),
    "layer_plain": lambda at: _last(at, nn.LayerNorm(at.width, elementwise_affine=False)),
    "rms": lambda at: _last(at, nn.RMSNorm(at.width, eps=1e-5)),
    "layer_by_hand": lambda at: ByHand(at, True),
    "rms_by_hand": lambda at: ByHand(at, False),
    "response": ResponseNorm,
}
norms = st.sampled_from(["batch", "none", *(n for n in NORMS if n not in ("batch", "none"))])


def pointwise_layer(at: Place, out: int, bias: bool = True) -> nn.Module:
    """A linear layer over the channels: a 1x1 convolution on maps."""
    if at.tokens:
        return nn.Linear(at.width, out, bias=bias)
    return CONVS[len(at.space) - 1](at.width, out, 1, bias=bias)
