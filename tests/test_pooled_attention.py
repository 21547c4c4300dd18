"""Attention whose queries, keys and values are pooled by a depthwise convolution, head by head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import demp_fx

HEADS, DIM, SIDE = 2, 6, 4
WIDTH = HEADS * DIM


class Pooled(nn.Module):
    """`extra`: tokens before the image's, which are not pooled."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra
        self.embed = nn.Linear(5, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.pools = nn.ModuleList(
            nn.Conv2d(DIM, DIM, 3, 2 if k else 1, 1, groups=DIM, bias=False) for k in range(3)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def pooled(self, x: Tensor, k: int) -> Tensor:
        batch, heads, _, dim = x.shape
        first, x = x[:, :, : self.extra], x[:, :, self.extra :]
        image = x.reshape(batch * heads, SIDE, SIDE, dim).permute(0, 3, 1, 2)
        image = self.pools[k](image)
        tokens = image.reshape(batch, heads, dim, -1).transpose(2, 3)
        if self.extra:
            tokens = torch.cat((first, tokens), dim=2)
        result: Tensor = self.norms[k](tokens)
        return result

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = (self.pooled(part, n) for n, part in enumerate(qkv.unbind(0)))
        mixed = ((q * DIM**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v + q
        result: Tensor = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return result


@pytest.mark.parametrize("extra", [0, 1])
def test_pooled_heads_are_narrowed_exactly(extra: int) -> None:
    torch.manual_seed(0)
    net = Pooled(extra).double().eval()
    with torch.no_grad():
        net.norm.weight[::2] = net.norm.bias[::2] = 0
        for norm in net.norms:
            assert isinstance(norm, nn.LayerNorm)
            norm.weight[:3] = norm.bias[:3] = 0
    x = torch.randn(2, SIDE * SIDE + extra, 5, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,), cuts="always").module
    y = torch.randn(4, SIDE * SIDE + extra, 5, dtype=torch.float64)
    torch.testing.assert_close(narrow(y), net(y), rtol=1e-12, atol=1e-12)
    assert narrow.get_submodule("qkv").weight.shape[1] == WIDTH // 2


@pytest.mark.parametrize("seed", range(4))
def test_tokens_that_are_not_pooled_go_with_those_that_are(seed: int) -> None:
    torch.manual_seed(seed)
    net = Pooled(extra=1).double().eval()
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (nn.LayerNorm, nn.Linear)) and torch.rand(1) < 0.7:
                dead = torch.randperm(layer.weight.shape[0])[::2]
                layer.weight[dead] = layer.bias[dead] = 0
    x = torch.randn(2, SIDE * SIDE + 1, 5, dtype=torch.float64)
    result = demp_fx.compile(net, (x,), cuts="always")
    assert not any("size" in pin.reason for pin in result.report.pinned)
    assert result.report.params_after < result.report.params_before
