"""Queries and keys that are turned by their places, two dims at a time, before heads part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import demp_fx

HEADS, WIDTH = 2, 16


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, WIDTH) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.linspace(
            0, 1, WIDTH // 2, dtype=x.dtype
        )
        cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)

        def turned(x: Tensor) -> Tensor:
            real, imaginary = x.unflatten(2, (-1, 2)).unbind(-1)
            return x * cos + torch.stack([-imaginary, real], -1).flatten(2) * sin

        q, k = turned(self.norm_q(self.q(x))), turned(self.norm_k(self.k(x)))
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k, self.v(x)))
        mixed = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


DEAD = {
    "pairs": ([0, 1, 2, 3, 8, 9, 10, 11], [0, 1, 2, 3, 8, 9, 10, 11]),
    "the query": (list(range(WIDTH)), []),
    "the key": ([], list(range(WIDTH))),
    "both": (list(range(WIDTH)), list(range(WIDTH))),
    "one head each": (list(range(8)), list(range(8, 16))),
    "half of each pair": (list(range(0, WIDTH, 2)), list(range(1, WIDTH, 2))),
}


@pytest.mark.parametrize("dead", DEAD)
def test_whatever_is_dead_of_queries_and_keys(dead: str) -> None:
    torch.manual_seed(0)
    model = Turned().double()
    with torch.no_grad():
        for layer, rows in zip((model.q, model.k), DEAD[dead], strict=True):
            layer.weight[rows] = 0
            layer.bias[rows] = 0
        model.v.weight[::2] = 0
        model.v.bias[::2] = 0
    result = demp_fx.compile(model, torch.randn(2, 5, 12).double(), cuts="always")
    widths = [getattr(result.module, name).weight.shape[0] for name in "qkv"]
    assert widths == [max(WIDTH - len(rows), 1) for rows in DEAD[dead]] + [WIDTH // 2]
    x = torch.randn(3, 7, 12).double()
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-12, atol=1e-12)
