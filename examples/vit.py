"""A small vision transformer. The demon prunes the hidden units of its MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, self.head).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return result


class Layer(nn.Module):
    """Attention and an MLP, each behind a layer norm and beside a skip."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        hidden = self.act(self.up(self.norm2(x)))
        result: Tensor = x + self.down(hidden)
        return result


class ViT(nn.Module):
    """Patches, layers, the mean of all tokens, a head."""

    def __init__(
        self, size: int = 32, patch: int = 4, channels: int = 3, width: int = 128, depth: int = 6,
        heads: int = 4, hidden: int = 512, classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.layers = nn.Sequential(*(Layer(width, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return logits


example_inputs = torch.zeros(1, 3, 32, 32)


def vit_small() -> ViT:
    """For images of 32 x 32."""
    return ViT()


def vit_digits() -> ViT:
    """For the digits, 8 x 8 and grey."""
    return ViT(size=8, patch=2, channels=1, width=32, depth=2, heads=2, hidden=128)
