"""Tensors that code makes of its own numbers, and then writes results into: at each call anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import demp_fx


def added(x: Tensor) -> Tensor:
    total = torch.zeros(8, dtype=x.dtype)
    total += x.mean((0, 1))
    total += x.amax((0, 1))
    return total


def added_by_method(x: Tensor) -> Tensor:
    total = torch.ones(8, dtype=x.dtype)
    total.add_(x.mean((0, 1)))
    return total * 2


def filled(x: Tensor) -> Tensor:
    total = torch.zeros(8, dtype=x.dtype)
    total[:4] = x.mean((0, 1))[:4]
    total[5] = x.mean()
    total *= 0.5
    return total


def read_alone(x: Tensor) -> Tensor:
    parts = torch.zeros(3, dtype=x.dtype)
    parts[0] = x.mean()
    parts[1] = x.square().mean()
    parts[2] = 0.25
    return parts.sum() + parts.shape[0] + parts.view(1, 3).amax()


def looked_up(x: Tensor) -> Tensor:
    table = torch.outer(torch.arange(10.0), torch.arange(8.0)).sin().to(x.dtype)
    rows = torch.arange(x.shape[1], device=x.device) * 10 // x.shape[1]
    return table[rows]


def counted(x: Tensor) -> Tensor:
    counts = torch.zeros(10, dtype=x.dtype)
    rows = torch.arange(x.shape[1]) * 10 // x.shape[1]
    counts[rows] += 1
    return counts.std() + counts[rows].sum()


WAYS = [added, added_by_method, filled, read_alone, looked_up, counted]


class Net(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.make, self.read = way, nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        result: Tensor = self.read(x + self.way(x))
        return result


@pytest.mark.parametrize("way", WAYS)
def test_one_call_leaves_nothing_to_the_next(way: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = Net(way).double()
    result = demp_fx.compile(net, torch.randn(2, 5, 6).double())
    assert not result.report.opaque
    for length in (5, 5, 7):
        x = torch.randn(3, length, 6).double()
        torch.testing.assert_close(result.module(x), net(x), rtol=1e-12, atol=1e-12)
    for _ in range(2):  # nor does a backward
        result.module(x).sum().backward()


def test_what_a_module_holds_in_a_list_is_said_to_be_lost() -> None:
    class Averages(Net):
        def __init__(self) -> None:
            super().__init__(added)
            self.held = [torch.zeros(8).double()]

        def forward(self, x: Tensor) -> Tensor:
            x = self.make(x)
            self.held[0].mul_(0.9).add_(x.detach().mean((0, 1)))
            result: Tensor = self.read(x + self.held[0])
            return result

    net = Averages().double()
    warnings = demp_fx.compile(net, torch.randn(2, 5, 6).double()).report.warnings
    assert any("first call only" in warning for warning in warnings)


def test_a_tensor_that_the_code_shares_is_not_changed_by_tracing() -> None:
    shared = torch.zeros(8).double()

    def way(x: Tensor) -> Tensor:
        shared.zero_()
        shared.add_(x.mean((0, 1)))
        return shared

    net = Net(way).double()
    demp_fx.trace(net, torch.randn(2, 5, 6).double())
    assert type(shared) is Tensor
    assert not vars(shared)
    assert not shared.any()
