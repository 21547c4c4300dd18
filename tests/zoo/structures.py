"""Small networks, one for each structure, some channels of each dead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, WIDTH, TOKENS = 3, 4, 12


@torch.no_grad()
def dead(layer: nn.Module, channels: Sequence[int]) -> None:
    """Zero some output channels of a layer: its weights and its bias."""
    for name in ("weight", "bias"):
        tensor = getattr(layer, name, None)
        if tensor is not None:
            tensor[list(channels)] = 0


class Attention(nn.Module):
    """Head 1's values are dead, and others': v 1 and 2 of head 0, k h of head h."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(TOKENS, HEADS * WIDTH) for _ in range(4))
        dead(self.v, [1, 2, 4, 5, 6, 7])
        dead(self.k, [0, 5, 10])

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            layer(x).view(x.shape[0], x.shape[1], HEADS, WIDTH).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (WIDTH**-0.5 * q @ k.transpose(-2, -1)).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(*self.heads(x))
        return self.o(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Scaled(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Biased(Attention):
    """A bias of each head, looked up by place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, HEADS))
        self.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5) + 4)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(5, 5, HEADS).permute(2, 0, 1)
        return (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v


class HeadScaled(Attention):
    """Cosine attention with a temperature of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (cosine * self.temperature).softmax(-1) @ v


class Kernel(Attention):
    """Linear attention: keys meet values first."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.transpose(-2, -1) @ v)


class Einsum(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)


class Batched(Attention):
    """Heads merged with the batch."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, h, t, d = q.shape
        q, k, v = (x.reshape(n * h, t, d) for x in (q, k, v))
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(n, h, t, d)


class Rotary(Attention):
    """Channels d and d + 2 of a head turn together."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = torch.arange(5, dtype=q.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=q.dtype)
        angle = torch.cat([angle, angle], -1)

        def turn(x: Tensor) -> Tensor:
            return x * angle.cos() + torch.cat([-x[..., 2:], x[..., :2]], -1) * angle.sin()

        return (turn(q) @ turn(k).transpose(-2, -1)).softmax(-1) @ v


class Fused(Attention):
    """One layer for queries, keys and values, taken apart in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(TOKENS, 3 * HEADS * WIDTH)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([x.weight for x in (self.q, self.k, self.v)]))
            self.qkv.bias.copy_(torch.cat([x.bias for x in (self.q, self.k, self.v)]))
        del self.q, self.k, self.v

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, _ = x.shape
        if self.how == "chunk":
            q, k, v = (
                part.view(n, t, HEADS, WIDTH).transpose(1, 2)
                for part in self.qkv(x).chunk(3, dim=-1)
            )
            return q, k, v
        qkv = self.qkv(x).reshape(n, t, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return qkv.unbind(0) if self.how == "unbind" else (qkv[0], qkv[1], qkv[2])


class GroupedQuery(nn.Module):
    """Six heads of queries share two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 8), nn.Linear(12, 8)
        self.o = nn.Linear(24, 12)
        dead(self.q, range(1, 24, 4))
        dead(self.v, [0, 5])

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 6, 4).transpose(1, 2)
        k = self.k(x).view(n, t, 2, 4).transpose(1, 2).repeat_interleave(3, 1)
        v = self.v(x).view(n, t, 2, 4).transpose(1, 2)[:, :, None]
        v = v.expand(n, 2, 3, t, 4).reshape(n, 6, t, 4)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(n, t, 24))


class Grouped(nn.Module):
    """A grouped convolution with unequal deaths on both of its sides."""

    def __init__(self, kind: type[nn.Conv1d] | type[nn.ConvTranspose1d], groups: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 12, 1), kind(12, 12, 3, groups=groups)
        self.norm, self.c = nn.BatchNorm1d(12), nn.Conv1d(12, 4, 1)
        dead(self.a, [0, 1, 2, 3, 5])
        dead(self.norm, [0, 4, 5])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(torch.relu(self.a(x)))).relu())


class CalledGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Normed(nn.Module):
    """Convolution, any norm with scale and shift, convolution."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Conv1d(3, 12, 1), norm, nn.Conv1d(12, 4, 1)
        dead(self.a, [0, 1, 2, 5])
        dead(norm, [0, 1, 2, 3, 7])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.a(x)).relu())


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Stream(nn.Module):
    """A residual stream, three channels of which nobody writes and no norm lets through."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 12), norm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.last, self.head = norm(12), nn.Linear(12, 3)
        for layer in (self.embed, self.down, self.norm, self.last):
            dead(layer, [0, 3, 7])
        dead(self.up, [2, 3, 4])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(self.last(x).mean(1))


class Selective(nn.Module):
    """Branches on a dim of their own, weighed channel by channel (a selective kernel)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 4, 1),
        )
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 1)
        dead(self.a, [0, 1, 5])
        dead(self.b, [0, 1, 5])

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.a(x), self.b(x)], 1)
        weights = self.excite(self.squeeze(branches.sum(1).mean((2, 3), keepdim=True)).relu())
        weights = weights.view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return self.c((branches * weights).sum(1))


class Shuffled(nn.Module):
    """A rearrangement of channels, as code or as torch's own."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 12) -> None:
        super().__init__()
        self.function = function
        self.a, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(channels, 4, 1)
        dead(self.a, [0, 1, 2, 3, 5, 6])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.function(self.a(x).relu()))


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)


def pixels(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


class Merged(nn.Module):
    """Four neighbours' channels side by side, normalised: a patch merging."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.reduce = nn.Linear(3, 8), nn.LayerNorm(32), nn.Linear(32, 4)
        dead(self.norm, [0, 5, 9, 31])
        dead(self.a, [2])

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(parts, -1)))


_SEQUENCE, _IMAGE, _LINE = (5, 12), (3, 6, 6), (3, 7)
_HEADS = {"q": (6, 12), "k": (6, 12), "v": (6, 12), "o": (12, 6)}

# how to build it; the shape of a sample; the weights' shapes when all that can be cut is cut
Shape = tuple[int, ...]
Structure = tuple[Callable[[], nn.Module], Shape, dict[str, Shape]]
STRUCTURES: dict[str, Structure] = {
    "attention": (Attention, _SEQUENCE, _HEADS),
    "scaled dot product": (Scaled, _SEQUENCE, _HEADS),
    "position bias": (Biased, _SEQUENCE, {**_HEADS, "table": (9, 2)}),
    "cosine attention": (
        HeadScaled, _SEQUENCE, {"temperature": (2, 1, 1), "v": (6, 12), "o": (12, 6)},
    ),
    "linear attention": (Kernel, _SEQUENCE, _HEADS),
    "einsum": (Einsum, _SEQUENCE, _HEADS),
    "heads in the batch": (Batched, _SEQUENCE, _HEADS),
    "rotary": (Rotary, _SEQUENCE, {"v": (6, 12), "o": (12, 6)}),
    "fused, unbind": (lambda: Fused("unbind"), _SEQUENCE, {"qkv": (18, 12), "o": (12, 6)}),
    "fused, index": (lambda: Fused("index"), _SEQUENCE, {"qkv": (18, 12), "o": (12, 6)}),
    "fused, chunk": (lambda: Fused("chunk"), _SEQUENCE, {"qkv": (18, 12), "o": (12, 6)}),
    "grouped query": (GroupedQuery, _SEQUENCE, {"q": (18, 12), "k": (6, 12), "v": (6, 12)}),
    "grouped": (
        lambda: Grouped(nn.Conv1d, 2), _LINE, {"a": (7, 3, 1), "norm": (9,), "c": (4, 9, 1)},
    ),
    "grouped, transposed": (
        lambda: Grouped(nn.ConvTranspose1d, 2), _LINE, {"a": (7, 3, 1), "norm": (9,)},
    ),
    "depthwise, transposed": (
        lambda: Grouped(nn.ConvTranspose1d, 12), _LINE,
        {"a": (6, 3, 1), "b": (6, 1, 3), "c": (4, 6, 1)},
    ),
    "group norm": (
        lambda: Normed(nn.GroupNorm(4, 12)), _LINE,
        {"a": (8, 3, 1), "norm": (9,), "c": (4, 7, 1)},
    ),
    "group norm, called": (
        lambda: Normed(CalledGroupNorm(4, 12)), _LINE,
        {"a": (8, 3, 1), "norm": (9,), "c": (4, 7, 1)},
    ),
    "group norm, one group": (
        lambda: Normed(nn.GroupNorm(1, 12)), _LINE, {"a": (8, 3, 1), "c": (4, 7, 1)},
    ),
    "instance norm": (
        lambda: Normed(nn.InstanceNorm1d(12, affine=True)), _LINE,
        {"a": (6, 3, 1), "norm": (6,), "c": (4, 6, 1)},
    ),
    "instance norm, bare": (
        lambda: Normed(nn.InstanceNorm1d(12)), _LINE, {"a": (8, 3, 1), "c": (4, 8, 1)},
    ),
    "group norm, bare": (
        lambda: Normed(nn.GroupNorm(4, 12, affine=False)), _LINE, {"a": (8, 3, 1)},
    ),
    **{
        name: (
            functools.partial(Stream, norm), (4, 5),
            {"embed": (9, 5), "norm": (9,), "up": (17, 9), "down": (9, 17), "head": (3, 9)},
        )
        for name, norm in (
            ("layer norm", nn.LayerNorm), ("rms norm", RMSNorm), ("torch's rms norm", nn.RMSNorm),
        )
    },
    "selective kernel": (
        Selective, _IMAGE, {"a": (5, 3, 1, 1), "b": (5, 3, 3, 3), "excite": (10, 4, 1, 1)},
    ),
    "channel shuffle": (
        lambda: Shuffled(shuffle), _IMAGE, {"a": (6, 3, 1, 1), "c": (4, 6, 1, 1)},
    ),
    "torch's channel shuffle": (
        lambda: Shuffled(lambda x: F.channel_shuffle(x, 3)), _IMAGE, {"c": (4, 6, 1, 1)},
    ),
    "roll": (lambda: Shuffled(lambda x: x.roll(5, 1)), _IMAGE, {"c": (4, 6, 1, 1)}),
    "pixel shuffle": (
        lambda: Shuffled(lambda x: F.pixel_shuffle(x, 2), 3), _IMAGE, {"c": (4, 2, 1, 1)},
    ),
    "pixel shuffle by hand": (lambda: Shuffled(pixels, 3), _IMAGE, {"c": (4, 2, 1, 1)}),
    "patch merging": (Merged, (4, 4, 3), {"a": (7, 3), "reduce": (4, 28)}),
}  # fmt: skip
