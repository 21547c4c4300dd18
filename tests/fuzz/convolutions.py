"""Convolutions of all sorts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.block import Block, Place
from tests.fuzz.layers import CONVS, NORMS, TRANSPOSED, Function, acts, divisor, norms, widths

kernels = st.sampled_from([1, 3])


class Conv(Block):
    """Convolution, norm, activation."""

    worlds = ("maps",)
    draws = {
        "out": widths, "kernel": kernels, "bias": st.booleans(), "norm": norms, "act": acts,
        "padding": st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
        "dilation": st.sampled_from([1, 2]),
    }  # fmt: skip

    def __init__(
        self, at: Place, out: int = 4, kernel: int = 3, bias: bool = False, norm: str = "batch",
        act: str = "relu", padding: str = "zeros", dilation: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(at)
        self.out = at.but(width=out)
        self.body = nn.Sequential(
            CONVS[len(at.space) - 1](
                at.width, out, kernel, padding=dilation * (kernel // 2), bias=bias,
                padding_mode=padding, dilation=dilation,
            ),
            NORMS[norm](self.out),
            Function(act),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Strided(Block):
    """A convolution that halves the resolution, without padding."""

    worlds = ("maps",)
    draws = {"width": widths, "norm": norms}

    def __init__(self, at: Place, width: int = 4, norm: str = "batch") -> None:
        super().__init__(at)
        kernel = 2 if min(at.space) > 1 else 1
        self.out = at.but(width=width, space=tuple((n - kernel) // 2 + 1 for n in at.space))
        conv = CONVS[len(at.space) - 1]
        self.body = nn.Sequential(conv(at.width, width, kernel, stride=2), NORMS[norm](self.out))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Transposed(Block):
    """A transposed convolution that doubles the resolution."""

    worlds = ("maps",)
    draws = {"width": widths, "groups": st.integers(1, 3), "bias": st.booleans(), "act": acts}

    def __init__(
        self, at: Place, width: int = 4, groups: int = 1, bias: bool = True, act: str = "relu"
    ) -> None:
        super().__init__(at)
        groups = divisor(at.width, groups)
        self.out = at.but(width=width * groups, space=tuple(2 * n for n in at.space))
        self.conv = TRANSPOSED[len(at.space) - 1](
            at.width, width * groups, 2, stride=2, groups=groups, bias=bias
        )
        self.act = Function(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Depthwise(Block):
    """Each channel filtered by itself, into one or more."""

    worlds = ("maps",)
    draws = {"times": st.integers(1, 3), "kernel": kernels, "norm": norms, "act": acts}

    def __init__(
        self, at: Place, times: int = 1, kernel: int = 3, norm: str = "batch", act: str = "relu"
    ) -> None:
        super().__init__(at)
        self.out = at.but(width=at.width * times)
        self.body = nn.Sequential(
            CONVS[len(at.space) - 1](
                at.width, at.width * times, kernel, padding=kernel // 2, groups=at.width
            ),
            NORMS[norm](self.out),
            Function(act),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Grouped(Block):
    """A convolution in groups, each of which may lose other channels."""

    worlds = ("maps",)
    draws = {
        "groups": st.integers(2, 4), "each": st.integers(1, 4), "kernel": kernels,
        "bias": st.booleans(), "norm": norms, "act": acts,
    }  # fmt: skip

    def __init__(
        self, at: Place, groups: int = 2, each: int = 2, kernel: int = 3, bias: bool = False,
        norm: str = "batch", act: str = "relu",
    ) -> None:  # fmt: skip
        super().__init__(at)
        groups = divisor(at.width, groups)
        self.out = at.but(width=each * groups)
        self.body = nn.Sequential(
            CONVS[len(at.space) - 1](
                at.width, each * groups, kernel, padding=kernel // 2, groups=groups, bias=bias
            ),
            NORMS[norm](self.out),
            Function(act),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Standardised(Block):
    """Weights are centred and scaled before every use, as in a NFNet."""

    worlds = ("maps",)
    draws = {
        "width": widths, "gain": st.booleans(), "bias": st.booleans(),
        "groups": st.integers(1, 3), "way": st.sampled_from(["by hand", "var_mean", "batch_norm"]),
    }  # fmt: skip

    def __init__(
        self, at: Place, width: int = 4, gain: bool = True, bias: bool = True, groups: int = 1,
        way: str = "by hand",
    ) -> None:  # fmt: skip
        super().__init__(at)
        self.way, self.groups = way, divisor(at.width, groups)
        width = width * self.groups
        self.out = at.but(width=width)
        dims = len(at.space)
        self.weight = nn.Parameter(torch.randn(width, at.width // self.groups, *[3] * dims))
        self.gain = nn.Parameter(torch.ones(width, *[1] * (dims + 1))) if gain else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.standardised()
        if self.gain is not None:
            weight = weight * self.gain
        return self.conv(x, weight, self.bias, padding=1, groups=self.groups)

    def standardised(self) -> Tensor:
        rest = list(range(1, self.weight.dim()))
        if self.way == "batch_norm":
            rows = self.weight.reshape(1, self.weight.shape[0], -1)
            rows = F.batch_norm(rows, None, None, training=True, eps=1e-4)
            return rows.reshape_as(self.weight)
        if self.way == "var_mean":
            var, mean = torch.var_mean(self.weight, rest, correction=0, keepdim=True)
            return (self.weight - mean) * torch.rsqrt(var + 1e-4)
        centred = self.weight - self.weight.mean(rest, keepdim=True)
        return centred / (centred.pow(2).mean(rest, keepdim=True) + 1e-4).sqrt()


class Unfolded(Block):
    """A convolution written as im2col and a product."""

    worlds = ("maps",)
    draws = {"width": widths}

    def __init__(self, at: Place, width: int = 4) -> None:
        super().__init__(at)
        self.flat = len(at.space) == 2
        self.out = at.but(width=width)
        self.weight = nn.Parameter(torch.randn(width, at.width * (9 if self.flat else 1)) / 4)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1) if self.flat else x.flatten(2)
        return (self.weight @ columns).unflatten(2, x.shape[2:])


class Tied(Block):
    """Two convolutions of one weight, with norms of their own."""

    worlds = ("maps",)
    draws = {"way": st.sampled_from(["tied", "transposed"]), "act": acts}

    def __init__(self, at: Place, way: str = "tied", act: str = "relu") -> None:
        super().__init__(at)
        conv = CONVS[len(at.space) - 1]
        self.way = way
        self.first = conv(at.width, at.width, 3, padding=1, bias=False)
        self.second = conv(at.width, at.width, 3, padding=1, bias=False)
        self.second.weight = self.first.weight
        self.norms = nn.ModuleList(NORMS["batch"](at) for _ in range(2))
        self.act = Function(act)
        self.back = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(at.space) - 1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norms[0](self.first(x)))
        if self.way == "tied":
            return self.norms[1](self.second(x))
        return self.norms[1](self.back(x, self.first.weight, padding=1))
