"""Scales, gates, positions, sizes: what stands between the layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.block import Block, Place, Spec
from tests.fuzz.layers import FUNCTIONS, NORMS, Function, acts, norms, pointwise_layer


class Norm(Block):
    """A norm alone."""

    draws = {"kind": norms}

    def __init__(self, at: Place, kind: str = "layer") -> None:
        super().__init__(at)
        self.norm = NORMS[kind](at)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Pointwise(Block):
    """A function of each number."""

    draws = {"name": st.sampled_from(list(FUNCTIONS))}

    def __init__(self, at: Place, name: str = "relu") -> None:
        super().__init__(at)
        self.function = Function(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.clone()) if self.function.name == "relu_" else self.function(x)


class LayerScale(Block):
    """One factor a channel, perhaps with a shift."""

    draws = {"shift": st.booleans()}

    def __init__(self, at: Place, shift: bool = False) -> None:
        super().__init__(at)
        self.gamma = nn.Parameter(torch.ones(at.width))
        self.beta = nn.Parameter(torch.zeros(at.width)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.at.shaped(self.gamma)
        return x if self.beta is None else x + self.at.shaped(self.beta)


class SqueezeExcite(Block):
    """Each channel scaled by a function of the means of all."""

    worlds = ("maps",)
    draws = {"hidden": st.integers(1, 4), "gate": st.sampled_from(["sigmoid", "relu6", "tanh"]),
             "how": st.sampled_from(["conv", "linear", "max", "spatial"])}  # fmt: skip

    def __init__(
        self, at: Place, hidden: int = 2, gate: str = "sigmoid", how: str = "conv"
    ) -> None:
        super().__init__(at)
        self.how = how
        here = at.but(tokens=how == "linear")
        self.squeeze = pointwise_layer(here, hidden)
        out = 1 if how == "spatial" else at.width
        self.excite = pointwise_layer(here.but(width=hidden), out)
        self.gate = Function(gate)

    def forward(self, x: Tensor) -> Tensor:
        space = list(range(2, x.dim()))
        match self.how:
            case "linear":
                scale = self.gate(self.excite(F.relu(self.squeeze(x.mean(space)))))
                return x * scale.view(*scale.shape, *[1] * len(space))
            case "max":
                pooled = x.mean(space, keepdim=True) + x.amax(space, keepdim=True)
            case "spatial":
                pooled = x
            case _:
                pooled = x.mean(space, keepdim=True)
        return x * self.gate(self.excite(F.relu(self.squeeze(pooled))))


class Gate(Block):
    """Half of the channels scale the other half."""

    draws = {"how": st.sampled_from(["glu", "chunk", "geglu", "simple", "split", "maxout"])}

    def __init__(self, at: Place, how: str = "glu") -> None:
        super().__init__(at)
        self.how = how
        half = max(1, at.width // 2)
        self.even = pointwise_layer(at, 2 * half)
        self.out = at.but(width=half)

    def forward(self, x: Tensor) -> Tensor:
        x = self.even(x)
        half = x.shape[self.dim] // 2
        match self.how:
            case "glu":
                return F.glu(x, self.dim)
            case "chunk":
                a, b = x.chunk(2, self.dim)
                return a * torch.sigmoid(b)
            case "geglu":
                a, b = x.chunk(2, self.dim)
                return F.gelu(b) * a
            case "split":
                a, b = x.split(half, dim=self.dim)
                return F.silu(a) * b
            case "maxout":
                return torch.maximum(*x.chunk(2, self.dim))
            case _:
                return x.narrow(self.dim, 0, half) * x.narrow(self.dim, half, half)


class Write(Block):
    """Channels written in place."""

    draws = {"how": st.sampled_from(["slice", "zero", "add", "mul", "copy", "fill", "index_add",
                                     "masked", "branch"])}  # fmt: skip

    def __init__(self, at: Place, how: str = "slice") -> None:
        super().__init__(at)
        self.how = how
        self.register_buffer("mask", torch.arange(at.width) % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        some = y.narrow(self.dim, 0, 1)
        match self.how:
            case "slice":
                if self.dim == 1:
                    y[:, :2] = 2 * x[:, :2]
                else:
                    y[..., :2] = 2 * x[..., :2]
            case "zero":
                some.zero_()
            case "add":
                y.add_(x)
            case "mul":
                some.mul_(3)
            case "copy":
                some.copy_(x.narrow(self.dim, x.shape[self.dim] - 1, 1))
            case "fill":
                some.fill_(0.4)
            case "index_add" if self.at.width > 1:
                index = torch.tensor([0, x.shape[self.dim] - 1])
                y.index_add_(self.dim, index, x.narrow(self.dim, 0, 2))
            case "branch":
                z = y + 1
                y.add_(1.0)
                return y * z
            case _:
                y.masked_fill_(self.at.shaped(self.mask), 0.3)
        return y


class Buffer(Block):
    """A buffer scales, shifts or masks the channels."""

    draws = {"how": st.sampled_from(["scale", "shift", "mask", "where", "matrix", "select"])}

    def __init__(self, at: Place, how: str = "scale") -> None:
        super().__init__(at)
        self.how = how
        self.register_buffer("vector", torch.randn(at.width))
        self.register_buffer("keep", (torch.arange(at.width) % 3 != 1))
        self.register_buffer("matrix", torch.randn(at.width, at.width))
        self.register_buffer("order", torch.randperm(at.width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "scale":
                return x * self.at.shaped(self.vector)
            case "shift":
                return self.at.shaped(self.vector) + x
            case "mask":
                return x * self.at.shaped(self.keep)
            case "where":
                return torch.where(self.at.shaped(self.keep), x, self.at.shaped(self.vector))
            case "matrix":
                return torch.tensordot(x, self.matrix, dims=([self.dim], [0])).movedim(-1, self.dim)
            case _:
                return x.index_select(self.dim, self.order)


class Nested(Block):
    """Modules in modules in modules."""

    draws = {"act": acts}
    nests = {"inner": "same"}

    def __init__(self, at: Place, inner: tuple[Spec, ...] = (), act: str = "none") -> None:
        super().__init__(at)
        body, self.out = self.chain(inner, at)
        self.parts = nn.ModuleDict(
            {"body": nn.Sequential(nn.Sequential(body)), "act": Function(act)}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["act"](self.parts["body"](x))
