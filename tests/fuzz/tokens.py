"""Tokens: what stands around attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.block import Block, Place, Spec
from tests.fuzz.layers import NORMS, Function, acts, divisor, norms, widths


class Mlp(Block):
    """Two linear layers with a function between; `gated`: a third one scales."""

    worlds = ("tokens",)
    draws = {"hidden": widths, "act": acts, "gated": st.booleans(), "norm": norms}

    def __init__(
        self, at: Place, hidden: int = 4, act: str = "gelu", gated: bool = False, norm: str = "none"
    ) -> None:
        super().__init__(at)
        here = at.but(width=hidden)
        self.up = nn.Linear(at.width, hidden)
        self.gate = nn.Linear(at.width, hidden, bias=False) if gated else None
        self.act, self.norm = Function(act), NORMS[norm](here)
        self.down = nn.Linear(hidden, at.width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.up(x))
        if self.gate is not None:
            y = y * self.gate(x)
        return self.down(self.norm(y))


class Linear(Block):
    """One linear layer to another width."""

    worlds = ("tokens",)
    draws = {"width": widths, "bias": st.booleans(), "act": acts}

    def __init__(self, at: Place, width: int = 4, bias: bool = True, act: str = "none") -> None:
        super().__init__(at)
        self.out = at.but(width=width)
        self.layer, self.act = nn.Linear(at.width, width, bias=bias), Function(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


class Mixer(Block):
    """A linear layer over the tokens, each channel by itself."""

    worlds = ("tokens",)
    fixed = True
    draws = {"act": acts}

    def __init__(self, at: Place, act: str = "gelu") -> None:
        super().__init__(at)
        self.mix = nn.Linear(at.space[0], at.space[0])
        self.act = Function(act)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.mix(x.transpose(1, 2))).transpose(1, 2)


class Shift(Block):
    """Some channels move along the tokens."""

    worlds = ("tokens",)
    draws = {"how": st.sampled_from(["pad", "roll", "mix"])}

    def __init__(self, at: Place, how: str = "pad") -> None:
        super().__init__(at)
        self.how = how
        self.mix = nn.Parameter(torch.rand(at.width))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        half = x.shape[-1] // 2
        if self.how == "roll":
            return torch.cat([x[..., :half], x[..., half:].roll(1, 1)], -1)
        if self.how == "pad":
            return torch.cat([x[..., :half], before[..., half:]], -1)
        return x * self.mix + before * (1 - self.mix)


class Recurrent(Block):
    """A recurrent layer, of which the input gets narrower."""

    worlds = ("tokens",)
    draws = {"kind": st.sampled_from(["LSTM", "GRU", "RNN"]), "width": widths}

    def __init__(self, at: Place, kind: str = "LSTM", width: int = 4) -> None:
        super().__init__(at)
        self.out = at.but(width=width)
        self.layer = getattr(nn, kind)(at.width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class ClassToken(Block):
    """A learned token in front while some blocks run; it is left out again, or added to all."""

    worlds = ("tokens",)
    draws = {"added": st.booleans()}
    nests = {"inner": "same"}

    def __init__(self, at: Place, inner: tuple[Spec, ...] = (), added: bool = False) -> None:
        super().__init__(at)
        self.added = added
        self.token = nn.Parameter(torch.randn(1, 1, at.width))
        self.body, out = self.chain(inner, at.but(space=(at.space[0] + 1,)))
        self.out = out.but(space=(out.space[0] - 1,))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))
        return x[:, 1:] + x[:, 0].unsqueeze(1) if self.added else x[:, 1:]


EQUATIONS = ["mix", "transposed", "outer", "grouped", "gram", "two"]


class Einsum(Block):
    """Products written with letters."""

    worlds = ("tokens",)
    draws = {"how": st.sampled_from(EQUATIONS), "width": st.integers(2, 6)}

    def __init__(self, at: Place, how: str = "mix", width: int = 4) -> None:
        super().__init__(at)
        self.how = how
        self.heads = divisor(at.width, 2)
        each = at.width // self.heads
        shapes = {
            "mix": (at.width, width), "transposed": (width, at.width), "outer": (width,),
            "grouped": (self.heads, each, width), "gram": (at.width,),
            "two": (3, at.width, width),
        }  # fmt: skip
        self.weight = nn.Parameter(torch.randn(*shapes[how]) / 2)
        widths = {"outer": at.width * width, "grouped": self.heads * width, "gram": at.width}
        self.out = at.but(width=widths.get(how, width))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        match self.how:
            case "mix":
                return torch.einsum("btc,co->bto", x, w)
            case "transposed":
                return torch.einsum("btc,oc->bto", x, w)
            case "outer":
                return torch.einsum("btc,o->btco", x, w).flatten(2)
            case "grouped":
                y = x.unflatten(-1, (self.heads, -1))
                return torch.einsum("btgc,gco->btgo", y, w).flatten(2)
            case "gram":
                return torch.einsum("btc,bsc,bsd->btd", x, x, x * w) / x.shape[1]
            case _:
                return torch.einsum("btc,eco->beto", x, w).mean(1)
