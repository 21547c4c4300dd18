"""Weights that are made for each sample, and channels that meet channels: products, affinities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.block import Block, Place
from tests.fuzz.layers import pointwise_layer, widths


class Experts(Block):
    """Filters mixed of several experts' for each sample, or scaled by a style."""

    worlds = ("maps",)
    draws = {
        "width": widths, "how": st.sampled_from(["stacked", "flat", "styled"]),
        "bias": st.booleans(), "depthwise": st.booleans(), "transposed": st.booleans(),
    }  # fmt: skip

    def __init__(
        self, at: Place, width: int = 4, how: str = "flat", bias: bool = True,
        depthwise: bool = False, transposed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(at)
        width = at.width if depthwise else width
        self.out, dims = at.but(width=width), len(at.space)
        self.how, self.transposed = how, transposed and not depthwise
        self.groups = at.width if depthwise else 1
        sides = (at.width, width) if self.transposed else (width, at.width // self.groups)
        self.sizes = (*sides, *[3] * dims)
        weight = torch.randn(2, *self.sizes) / at.width
        self.weight = nn.Parameter(weight.flatten(1) if how == "flat" else weight)
        self.bias = nn.Parameter(torch.randn(2, width)) if bias else None
        self.route = nn.Linear(at.width, at.width if how == "styled" else 2)
        convs = (F.conv1d, F.conv2d, F.conv3d)
        transposes = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        self.conv = (transposes if self.transposed else convs)[dims - 1]

    def forward(self, x: Tensor) -> Tensor:
        b, c, *space = x.shape
        code = self.route(x.flatten(2).mean(2)).tanh()
        first, second, *kernel = self.sizes
        if self.how == "styled":
            inputs = 1 if self.groups == 1 and not self.transposed else 0
            shape = [1] * len(self.sizes)
            shape[inputs] = c
            weight = self.weight[0] * code.view(b, *shape)
            bias = None if self.bias is None else self.bias[:1].expand(b, -1).reshape(-1)
        else:
            weight = code @ self.weight.view(2, -1)
            bias = None if self.bias is None else (code @ self.bias).view(-1)
        weight = weight.reshape(b * first, second, *kernel)
        merged = x.reshape(1, b * c, *space)
        out = self.conv(merged, weight, bias, padding=1, groups=self.groups * b)
        return out.view(b, -1, *out.shape[2:])


class Made(Block):
    """A linear layer's weights are made by another one, of the means."""

    worlds = ("tokens",)
    draws = {"width": widths, "how": st.sampled_from(["bmm", "einsum", "matmul"])}

    def __init__(self, at: Place, width: int = 4, how: str = "bmm") -> None:
        super().__init__(at)
        self.out, self.how = at.but(width=width), how
        self.make = nn.Linear(at.width, at.width * width)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[0], x.shape[-1]
        x = x.reshape(b, -1, c)
        weight = self.make(x.mean(1)).view(b, c, self.out.width)
        match self.how:
            case "bmm":
                return torch.bmm(x, weight)
            case "einsum":
                return torch.einsum("bnc,bcd->bnd", x, weight)
        return x @ weight


class Pairs(Block):
    """Products of some channels with others, at each place, read by a layer."""

    draws = {"a": st.integers(1, 4), "b": st.integers(1, 4), "scaled": st.booleans()}

    def __init__(self, at: Place, a: int = 3, b: int = 2, scaled: bool = False) -> None:
        super().__init__(at)
        self.first, self.second = pointwise_layer(at, a), pointwise_layer(at, b)
        self.scale = nn.Parameter(torch.rand(a * b)) if scaled else None
        self.read = pointwise_layer(at.but(width=a * b), at.width)

    def forward(self, x: Tensor) -> Tensor:
        a, b, d = self.first(x).relu(), self.second(x).tanh(), self.dim
        if self.at.tokens:
            cells = (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)
        else:
            cells = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1, 2)
        if self.scale is not None:
            cells = cells * (self.scale if d == -1 else self.at.shaped(self.scale))
        return self.read(cells)


class Affinities(Block):
    """Channels attend to channels."""

    worlds = ("maps",)
    draws = {"scores": st.sampled_from(["softmax", "apart", "plain"])}

    def __init__(self, at: Place, scores: str = "softmax") -> None:
        super().__init__(at)
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        alike = rows @ rows.transpose(1, 2)
        if self.scores == "apart":
            alike = torch.max(alike, -1, keepdim=True)[0].expand_as(alike) - alike
        shares = alike.tanh() if self.scores == "plain" else alike.softmax(-1)
        return (shares @ rows).view_as(x) + x


class Shifted(Block):
    """Runs of channels are moved along the places, written into zeros."""

    draws = {"part": st.integers(2, 4)}

    def __init__(self, at: Place, part: int = 2) -> None:
        super().__init__(at)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.at.tokens else x.transpose(1, -1)
        run = x.shape[-1] // self.part
        out = torch.zeros_like(x)
        out[:, :-1, ..., :run] = x[:, 1:, ..., :run]
        out[:, 1:, ..., run : 2 * run] = x[:, :-1, ..., run : 2 * run]
        out[..., 2 * run :] = x[..., 2 * run :]
        return out if self.at.tokens else out.transpose(1, -1)
