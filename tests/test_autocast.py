"""A narrow network under autocast, where a stream and its branches often have two dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import demp_fx


class Mixed(nn.Module):
    """A float32 stream (a parameter is added, a norm over channels) with narrower branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.branch_norm = nn.BatchNorm2d(16)
        self.position = nn.Parameter(torch.randn(1, 16, 8, 8))
        self.before = nn.LayerNorm(16)
        self.inner = nn.Linear(16, 32)
        self.outer = nn.Linear(32, 16)
        self.after = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.branch_norm(self.conv(x)).relu()
        x = (x + self.position).flatten(2).transpose(1, 2)
        x = x + self.outer(self.inner(self.before(x)).relu())
        return self.head(self.after(x).mean(1))


def _half_dead() -> Mixed:
    torch.manual_seed(0)
    net = Mixed().eval()
    with torch.no_grad():
        for norm, dead in ((net.norm, slice(0, 4)), (net.branch_norm, slice(2, 12))):
            norm.weight[dead] = 0
            norm.bias[dead] = 0
        net.branch_norm.bias[8] = 1.0
        net.position[:, 2:4] = 0
        net.outer.weight[2:8] = 0
        net.outer.bias[2:4] = 0
        net.before.weight[2:4] = net.before.bias[2:4] = 0
        net.after.weight[2:4] = net.after.bias[2:4] = 0
    return net


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_and_agrees_within_what_the_dense_network_rounds(dtype: torch.dtype) -> None:
    net, x = _half_dead(), torch.randn(4, 3, 8, 8)
    narrow = demp_fx.compile(net, (x,), cuts="always").module
    exact = net(x)
    with torch.autocast("cpu", dtype):
        dense, ours = net(x), narrow(x)
        ours.sum().backward()
    assert ours.dtype == dense.dtype
    rounding = (dense.float() - exact).abs().max()
    assert (ours.float() - exact).abs().max() <= 2 * rounding
    assert all(p.grad is not None for p in narrow.parameters())


def test_whole_module_in_half_precision() -> None:
    net, x = _half_dead(), torch.randn(4, 3, 8, 8)
    narrow = demp_fx.compile(net, (x,), cuts="always").module.bfloat16()
    assert narrow(x.bfloat16()).dtype == torch.bfloat16


def test_whole_numbers_that_are_summed_stay_whole() -> None:
    class Bits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            total = self.a(x).relu().long() + self.b(x).relu().long()
            return self.head(total.to(x.dtype))

    net = Bits().double()
    with torch.no_grad():
        net.a.weight[:3] = net.a.bias[:3] = 0
        net.b.weight[2:6] = net.b.bias[2:6] = 0
    x = torch.randn(5, 6, dtype=torch.float64) * 9
    narrow = demp_fx.compile(net, (x,), cuts="always").module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
