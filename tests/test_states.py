"""Buffers that a forward writes to: what they hold now is not what the next call finds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.analysis import walk


class Stateful(nn.Module):
    """A state of zeros is read, and then changed."""

    def __init__(
        self, change: Callable[[nn.Module, Tensor], object], shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.change = change
        self.make, self.read = nn.Linear(6, 8), nn.Linear(8, 5)
        self.register_buffer("state", torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        result: Tensor = self.read(x * self.state)
        self.change(self, x.detach())
        return result


def _assigned(net: nn.Module, x: Tensor) -> None:
    net.state = 0.9 * net.state + 0.1 * x.mean(0)


CHANGES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "counted": lambda net, x: net.state.add_(1),
    "replaced": lambda net, x: net.state.copy_(x.mean(0)),
    "averaged": lambda net, x: net.state.lerp_(x.mean(0), 0.5),
    "given back": lambda net, x: torch.add(net.state, 1.0, out=net.state),
    "assigned": _assigned,
}


@pytest.mark.parametrize("shape", [(8,), (3, 8)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_state_is_not_taken_for_a_constant(change: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = Stateful(CHANGES[change], shape).double()
    narrow = demp_fx.compile(net, torch.randn(3, 6).double()).module
    own = copy.deepcopy(net)
    for _ in range(3):
        x = torch.randn(3, 6).double()
        torch.testing.assert_close(narrow(x), own(x), rtol=1e-12, atol=1e-12)


def test_a_constant_beside_a_state_is_still_one() -> None:
    net = Stateful(lambda net, x: net.state.add_(x.mean()), ()).double()
    with torch.no_grad():
        net.make.weight[:3], net.make.bias[:3] = 0, 0
    narrow = demp_fx.compile(net, torch.randn(3, 6).double()).module
    assert narrow.get_parameter("make.weight").shape == (5, 6)


def test_a_counter_that_nothing_is_computed_with_costs_no_second_look() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).train()
    graph = demp_fx.trace(net, torch.randn(3, 6))
    assert not walk(graph).rewritten()
