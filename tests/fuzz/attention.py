"""Tokens: attention of all sorts, and what stands around it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.block import Block, Place


def rotate(x: Tensor) -> Tensor:
    """Rotary positions, on the last dim of (batch, heads, tokens, even)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / (1 + torch.arange(half))
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()]
    return torch.cat([*turned, x[..., 2 * half :]], -1)


class Attention(Block):
    """Attention between tokens, or from tokens to `memory`, which is learned.

    `groups`: how many heads share one key and value. `kind`: how queries, keys and values are made.
    """

    worlds = ("tokens",)
    draws = {
        "heads": st.integers(1, 3), "size": st.integers(1, 4), "groups": st.integers(1, 2),
        "kind": st.sampled_from(["fused", "separate", "cross", "unbound"]),
        "product": st.sampled_from(["sdpa", "scaled_after", "scaled_before", "einsum", "relu"]),
        "bias": st.booleans(), "extra": st.sampled_from(
            ["none", "causal", "rotary", "qk_norm", "qk_l2", "temperature", "relative", "talking"]),
    }  # fmt: skip

    def __init__(
        self, at: Place, heads: int = 2, size: int = 3, groups: int = 1, kind: str = "fused",
        product: str = "sdpa", bias: bool = True, extra: str = "none",
    ) -> None:  # fmt: skip
        super().__init__(at)
        self.heads, self.size, self.kind, self.product = heads, size, kind, product
        self.groups = 1 if kind in ("fused", "unbound") else groups
        self.extra, self.fixed = extra, extra == "relative"
        q, kv = heads * self.groups * size, heads * size
        if kind in ("fused", "unbound"):
            self.qkv = nn.Linear(at.width, 3 * q, bias=bias)
        else:
            self.q = nn.Linear(at.width, q, bias=bias)
            self.k = nn.Linear(at.width, kv, bias=bias)
            self.v = nn.Linear(at.width, kv, bias=bias)
        if kind == "cross":
            self.memory = nn.Parameter(torch.randn(1, 3, at.width))
        if extra == "qk_norm":
            self.q_norm, self.k_norm = nn.LayerNorm(size), nn.RMSNorm(size)
        if extra == "temperature":
            self.temperature = nn.Parameter(torch.ones(heads * self.groups, 1, 1))
        if extra == "talking":
            self.talk = nn.Linear(heads * self.groups, heads * self.groups)
        if extra == "relative":
            sources = 3 if kind == "cross" else at.space[0]
            self.table = nn.Parameter(torch.randn(heads * self.groups, at.space[0], sources))
        self.proj = nn.Linear(q, at.width)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as (batch, heads, tokens, size)."""
        n, t, _ = x.shape
        if self.kind == "fused":
            qkv = self.qkv(x).reshape(n, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
            return qkv[0], qkv[1], qkv[2]
        if self.kind == "unbound":
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (q, k, v))
            return q, k, v
        source = self.memory.expand(n, -1, -1) if self.kind == "cross" else x
        q = self.q(x).view(n, t, self.heads * self.groups, self.size).transpose(1, 2)
        k, v = (
            p.view(n, source.shape[1], self.heads, self.size).transpose(1, 2)
            for p in (self.k(source), self.v(source))
        )
        if self.groups > 1:
            k, v = (p.repeat_interleave(self.groups, 1) for p in (k, v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        match self.extra:
            case "rotary":
                q, k = rotate(q), rotate(k)
            case "qk_norm":
                q, k = self.q_norm(q), self.k_norm(k)
            case "qk_l2":
                q, k = F.normalize(q, dim=-1, eps=0.1), F.normalize(k, dim=-1, eps=0.1)
            case "temperature":
                q = q * self.temperature
        mask = None
        if self.extra == "relative":
            mask = self.table
        elif self.extra == "causal":
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
            mask = torch.where(mask, 0.0, float("-inf")).to(x.dtype)
        y = self.attend(q, k, v, mask)
        return self.proj(y.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1])
        match self.product:
            case "sdpa" if self.extra != "talking":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            case "scaled_after":
                scores = q @ k.transpose(-2, -1) / math.sqrt(self.size)
            case "einsum":
                scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
            case _:
                scores = (q * self.size**-0.5) @ k.mT
        if mask is not None:
            scores = scores + mask
        if self.extra == "talking":
            scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.product == "relu" and mask is None:
            return torch.matmul(F.relu(scores), v) / k.shape[-2]
        weights = scores.softmax(-1)
        if self.product == "einsum":
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        return weights @ v


class ChannelAttention(Block):
    """Attention between channels (XCiT) or without a softmax over tokens (linear attention)."""

    worlds = ("tokens",)
    draws = {"heads": st.integers(1, 2), "size": st.integers(1, 4), "linear": st.booleans()}

    def __init__(self, at: Place, heads: int = 2, size: int = 3, linear: bool = False) -> None:
        super().__init__(at)
        self.heads, self.size, self.linear = heads, size, linear
        self.qkv = nn.Linear(at.width, 3 * heads * size)
        self.proj = nn.Linear(heads * size, at.width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        if self.linear:
            q, k = F.elu(q) + 1, F.elu(k) + 1
            y = q @ (k.transpose(-2, -1) @ v) / t
        else:
            q, k = q.transpose(-2, -1), k.transpose(-2, -1)
            scores = F.normalize(q, dim=-1, eps=0.1) @ F.normalize(k, dim=-1, eps=0.1).mT
            y = (scores.softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1)
        return self.proj(y.transpose(1, 2).reshape(n, t, -1))


class TorchAttention(Block):
    """torch.nn's own attention and transformer layers."""

    worlds = ("tokens",)
    draws = {"heads": st.integers(1, 2), "how": st.sampled_from(["self", "kdim", "encoder",
             "encoder_first", "decoder"])}  # fmt: skip

    def __init__(self, at: Place, heads: int = 2, how: str = "self") -> None:
        super().__init__(at)
        self.how = how
        width = 2 * heads
        self.into = nn.Linear(at.width, width)
        self.back = nn.Linear(width, at.width)
        options = {"dim_feedforward": 5, "batch_first": True, "dropout": 0.1}
        if how.startswith("encoder"):
            self.layer = nn.TransformerEncoderLayer(
                width, heads, norm_first=how == "encoder_first", **options
            )
        elif how == "decoder":
            self.layer = nn.TransformerDecoderLayer(width, heads, **options)
        else:
            kdim = at.width if how == "kdim" else None
            self.layer = nn.MultiheadAttention(width, heads, batch_first=True, kdim=kdim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        if self.how == "decoder":
            y = self.layer(y, 0.5 * y)
        elif self.how == "kdim":
            y = self.layer(y, x, y)[0]
        elif self.how == "self":
            y = self.layer(y, y, y, need_weights=False)[0]
        else:
            y = self.layer(y)
        return self.back(y)
