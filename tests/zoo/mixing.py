"""Small networks in which something mixes channels, or merges them: what is dead around it goes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.structures import Shape, Structure, dead


class ChannelAttention(nn.Module):
    """A convolution along the channels of a pooled value weighs the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.along = nn.Conv1d(1, 1, 3, padding=1)
        dead(self.a, [0, 3, 4])

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        weights = self.along(x.mean((2, 3)).view(x.shape[0], 1, -1))
        return self.c(x * weights.sigmoid().view(x.shape[0], -1, 1, 1))


class Affinities(nn.Module):
    """Channels attend to channels, by how alike they are; a dead one does, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        dead(self.a, [0, 3, 4])

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        rows = x.flatten(2)
        alike = torch.bmm(rows, rows.transpose(1, 2))
        apart = torch.max(alike, -1, keepdim=True)[0].expand_as(alike) - alike
        return self.c(torch.bmm(apart.softmax(-1), rows).view_as(x) * 0.5 + x)


class Piecewise(nn.Module):
    """An activation whose slopes and offsets are made of the value, some for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.make, self.c = nn.Conv2d(3, 8, 1), nn.Linear(8, 32), nn.Conv2d(8, 4, 1)
        dead(self.a, [0, 3, 4])

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        lines = self.make(x.mean((2, 3))).view(-1, 8, 4)
        several = x.permute(2, 3, 0, 1).unsqueeze(-1) * lines[..., :2] + lines[..., 2:]
        return self.c(several.max(-1)[0].permute(2, 3, 0, 1))


class Strided(nn.Module):
    """A convolution along the channels gives fewer of them, not all of which are read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(3, 9), nn.Linear(4, 2)
        self.along = nn.Conv1d(1, 1, 3, stride=2)
        dead(self.a, [0, 3, 4])
        with torch.no_grad():
            self.c.weight[:, [1, 2]] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.along(self.a(x).unsqueeze(1)).squeeze(1).relu())


class Beside(nn.Module):
    """A convolution over space, with channels on a dim where its kernel has one tap."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.space, self.c = nn.Linear(6, 8), nn.Conv2d(1, 2, (3, 1)), nn.Linear(8, 4)
        dead(self.a, [0, 3, 4])
        with torch.no_grad():
            self.c.weight[:, [0, 4, 5]] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.space(self.a(x).unsqueeze(1)).relu())


class Written(nn.Module):
    """An activation in place behind a norm that needs all channels, though not all are read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.act = nn.Hardswish(inplace=True)
        dead(self.norm, [1, 2, 6])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.norm(self.a(x))))


class Spread(nn.Module):
    """One value weighed in several ways, each a run of channels of its own that a norm tells
    apart."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.weights = nn.Conv1d(12, 4, 1), nn.Conv1d(12, 3, 1)
        self.norm, self.c = nn.BatchNorm1d(12), nn.Conv1d(12, 2, 1)
        dead(self.norm, [0, 1, 2, 5, 9])

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        product = self.values(x).unsqueeze(1) * self.weights(x).mean((1, 2))[:, None, None, None]
        several = product.expand(-1, 3, -1, -1) * torch.arange(1.0, 4.0).to(x).view(3, 1, 1)
        return self.c(self.norm(several.reshape(x.shape[0], 12, -1)).relu())


class AcrossPositions(nn.Module):
    """A weight over the positions: what is zero at all of them is zero in every mean of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(12, 8), nn.Linear(8, 4)
        self.means = nn.Parameter(torch.randn(_SEQUENCE[0], 3))
        dead(self.a, [1, 2, 6])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.einsum("bnd,nk->bkd", self.a(x), self.means))


class EachHead(nn.Module):
    """A table with a row for each head: what goes of it goes of all heads alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(12, 12), nn.Linear(12, 4)
        self.table = nn.Parameter(torch.randn(3, 4))
        dead(self.a, [0, 4, 5, 8])

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).unflatten(-1, (3, 4)) * self.table
        return self.c(x.relu().flatten(-2))


class ConstantValues(nn.Module):
    """Attention to values some of which are constant: a mean of them is that constant."""

    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.mix = mix
        with torch.no_grad():
            self.v.weight[[0, 4, 9]] = 0

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.mix(q, k, v).transpose(1, 2).reshape(n, t, 12))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (0.5 * q @ k.transpose(-2, -1)).softmax(-1) @ v


def leaky(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Shares that no longer sum to one."""
    return (q @ k.transpose(-2, -1)).softmax(-1)[..., :-1] @ v[:, :, :-1]


class Blind(ConstantValues):
    """The first token sees nobody: torch gives it zeros."""

    def __init__(self) -> None:
        super().__init__(self.masked)
        self.register_buffer("mask", torch.zeros(5, 5))
        self.mask[0] = -torch.inf

    def masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class OneInput(Blind):
    """Queries, keys and values are one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q = self.k = self.v

    def masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(v, v, v, self.mask)


class ComputedBias(nn.Module):
    """Attention with a mask, and a bias that a layer computes from a table of places: no channels
    of the tokens, two of which are merged behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.places, self.o = nn.Linear(12, 36), nn.Linear(2, 3), nn.Linear(24, 2)
        self.register_buffer("coordinates", torch.rand(16, 2))
        self.register_buffer("mask", -100.0 * torch.ones(4, 4).triu(1))
        dead(self.qkv, [24, 29])

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.places(self.coordinates).relu().transpose(0, 1).reshape(3, 4, 4)
        scores = q @ k.transpose(-2, -1) + bias.unsqueeze(0) + self.mask
        mixed = scores.softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(n, t // 2, 24))


_SEQUENCE: Shape = (5, 12)
_MEANS: dict[str, Shape] = {"v": (9, 12), "o": (12, 9)}


class Looked(nn.Module):
    """Bags of rows that are picked by numbers; some columns of the table are zero."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.table, self.c = nn.EmbeddingBag(5, 8, mode=mode), nn.Linear(8, 4)
        with torch.no_grad():
            self.table.weight[:, [0, 3, 4]] = 0

    def forward(self, x: Tensor) -> Tensor:
        bags = self.table((x.flatten(1) * 3).to(torch.int64).abs().clamp(max=4))
        return self.c(bags) + x.mean()


class Pairs(nn.Module):
    """A bilinear layer of two values; some channels of each, and some of its own, are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pair = nn.Linear(6, 8), nn.Linear(6, 7), nn.Bilinear(8, 7, 5)
        self.c = nn.Linear(5, 4)
        dead(self.a, [0, 3])
        dead(self.b, [1, 2, 6])
        dead(self.pair, [4])
        with torch.no_grad():
            self.pair.weight[:, 5] = 0  # nobody reads it
            self.pair.weight[:, :, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.pair(self.a(x).relu(), self.b(x).tanh()))


MIXING: dict[str, Structure] = {
    "a bilinear layer": (Pairs, (6,), {"a": (5, 6), "b": (3, 6), "pair": (4, 5, 3), "c": (4, 4)}),
    "a bag of rows": (lambda: Looked("mean"), (6,), {"table": (5, 5), "c": (4, 5)}),
    "the most of a bag": (lambda: Looked("max"), (6,), {"table": (5, 5), "c": (4, 5)}),
    "channel attention": (
        ChannelAttention, (3, 6, 6), {"a": (5, 3, 1, 1), "c": (4, 5, 1, 1), "along": (1, 1, 3)},
    ),
    "attention of channels": (Affinities, (3, 6, 6), {"a": (5, 3, 1, 1), "c": (4, 8, 1, 1)}),
    "lines for each channel": (
        Piecewise, (3, 6, 6), {"a": (5, 3, 1, 1), "make": (32, 5), "c": (4, 8, 1, 1)},
    ),
    "strided over channels": (Strided, (3,), {"a": (6, 3), "c": (2, 2)}),
    "one tap": (Beside, (4, 6), {"a": (4, 6), "c": (4, 5)}),
    "written in place": (Written, _SEQUENCE, {"a": (8, 12), "norm": (8,), "c": (4, 5)}),
    "one value, several weights": (
        Spread, _SEQUENCE, {"values": (3, 12, 1), "norm": (7,), "c": (2, 7, 1)},
    ),
    "a table of heads": (EachHead, _SEQUENCE, {"a": (8, 12), "table": (3, 3), "c": (4, 8)}),
    "weights over positions": (AcrossPositions, _SEQUENCE, {"a": (5, 12), "c": (4, 5)}),
    "constant values": (
        lambda: ConstantValues(F.scaled_dot_product_attention), _SEQUENCE, _MEANS,
    ),
    "constant values, by hand": (lambda: ConstantValues(by_hand), _SEQUENCE, _MEANS),
    "no shares of one value": (OneInput, _SEQUENCE, {"o": (12, 12)}),
    "bias of computed places": (ComputedBias, (4, 12), {"qkv": (34, 12), "o": (2, 20)}),
    "no shares": (lambda: ConstantValues(leaky), _SEQUENCE, {"v": (9, 12), "o": (12, 12)}),
    "no shares where all is masked": (Blind, _SEQUENCE, {"v": (9, 12), "o": (12, 12)}),
}  # fmt: skip
