"""Attention keeps constants: what is one number everywhere is that number on average, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import demp_fx

DEAD = [1, 2, 5, 6, 9, 10, 13, 14]  # of 16 value channels: two of each head's four


class Attention(nn.Module):
    """Four heads; the values of half the channels are their bias alone."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], 4, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            mixed = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        result: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return result


def _constant_values(net: Attention) -> Attention:
    with torch.no_grad():
        net.v.weight[DEAD] = 0  # the bias stays
    return net.double().eval()


@pytest.mark.parametrize("fused", [False, True])
def test_constant_values_fold_into_what_reads_the_average(fused: bool) -> None:
    torch.manual_seed(0)
    net, x = _constant_values(Attention(fused)), torch.randn(3, 7, 16, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,), cuts="always").module
    assert narrow.get_submodule("v").weight.shape == (8, 16)
    assert narrow.get_submodule("proj").weight.shape == (16, 8)
    longer = torch.randn(2, 11, 16, dtype=torch.float64)
    torch.testing.assert_close(narrow(longer), net(longer), rtol=1e-12, atol=1e-12)
    narrow(x).sum().backward()


def test_constants_stay_where_a_mask_may_leave_nothing_to_average() -> None:
    torch.manual_seed(0)
    net, x = _constant_values(Attention(fused=True)), torch.randn(3, 7, 16, dtype=torch.float64)
    seen = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    narrow = demp_fx.compile(net, (x, seen), cuts="always").module
    nothing = seen.clone()
    nothing[0, :, 2] = False  # this row is zeros, not the constants
    torch.testing.assert_close(narrow(x, nothing), net(x, nothing), rtol=1e-12, atol=1e-12)


def test_shares_over_another_dim_are_none() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.v, self.proj = nn.Linear(16, 7), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.proj(self.scores(x).softmax(1) @ self.v(x))
            return result

    torch.manual_seed(0)
    net = Columns().double()
    with torch.no_grad():
        net.v.weight[DEAD] = 0
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,), cuts="always").module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


class Pooled(nn.Module):
    """All places of each channel averaged, with one share for each: the shares come second."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.weigh, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 1, 1), nn.Linear(8, 2)
        with torch.no_grad():
            self.make.weight[[1, 4, 6]] = 0  # the bias stays
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        shares = self.weigh(x).flatten(1).softmax(-1)
        pooled: Tensor = self.read((self.make(x).flatten(2) @ shares.unsqueeze(-1)).squeeze(-1))
        return pooled


def test_shares_may_come_second_and_be_moved() -> None:
    torch.manual_seed(0)
    net, x = Pooled(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    narrow = demp_fx.compile(net, x, cuts="always").module
    assert narrow.get_submodule("read").weight.shape == (2, 5)
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


class Bins(nn.Module):
    """Shares over bins, read by a convolution that weighs the bins: box edges, as detectors do."""

    def __init__(self, kernel: int, padding: int) -> None:
        super().__init__()
        self.make, self.bins = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.edges = nn.Conv2d(4, 5, kernel, padding=padding, bias=False)
        self.read = nn.Conv2d(5, 2, 1)
        with torch.no_grad():
            for p in (self.make.weight, self.make.bias, self.edges.weight):
                p[:3] = 0
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        shares = self.bins(self.make(x).relu()).softmax(1)
        edges: Tensor = self.read(self.edges(shares))
        return edges


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (1, 1), (3, 1)])
def test_shares_may_be_read_by_a_convolution(kernel: int, padding: int) -> None:
    torch.manual_seed(0)
    net, x = Bins(kernel, padding), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    result = demp_fx.compile(net, x, cuts="always")
    assert not any("error" in pin.reason for pin in result.report.pinned)
    assert result.module.get_submodule("make").weight.shape[0] == 5
    assert result.module.get_submodule("edges").weight.shape[:2] == (2, 4)
    torch.testing.assert_close(result.module(x), net(x), rtol=1e-12, atol=1e-12)


def test_weights_that_are_shares_average_at_each_tap_of_a_kernel() -> None:
    class Blur(nn.Module):
        def __init__(self, kernel: int) -> None:
            super().__init__()
            self.make, self.read = nn.Conv2d(3, 4, 1), nn.Conv2d(5, 2, 1)
            self.blur = nn.Parameter(torch.randn(5, 4, kernel, kernel))
            with torch.no_grad():
                self.make.weight.zero_()
                self.make.bias.fill_(0.5)

        def forward(self, x: Tensor) -> Tensor:
            read: Tensor = self.read(F.conv2d(self.make(x), self.blur.softmax(1)))
            return read

    for kernel in (1, 2):
        torch.manual_seed(0)
        net, x = Blur(kernel).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
        narrow = demp_fx.compile(net, x, cuts="always").module
        torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
