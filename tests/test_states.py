"""Buffers that a forward writes to: what they hold now is not what the next call finds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.analysis import walk
from demp_fx.errors import VerificationError


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


def test_a_second_call_is_compared_where_the_first_changes_a_state() -> None:
    net = Stateful(CHANGES["averaged"], (8,)).double()
    x, right, wrong = torch.randn(3, 6).double(), copy.deepcopy(net), copy.deepcopy(net)
    wrong.change = lambda net, x: None  # right, once
    torch.testing.assert_close(wrong(x), copy.deepcopy(net)(x))
    assert demp_fx.passes.verify(net, right, x).eval_error < 1e-12
    with pytest.raises(VerificationError, match="differs"):
        demp_fx.passes.verify(net, wrong, x)
    assert bool((net.state == 0).all())


def _stepped(net: nn.Module, x: Tensor) -> None:
    net.state = x.detach().mean(0)


def _through_data(net: nn.Module, x: Tensor) -> None:
    net.state.data.copy_(x.detach().mean(0))


def _new_data(net: nn.Module, x: Tensor) -> None:
    net.state.data = net.state * 0.5 + x.detach().mean(0)


def _constant_data(net: nn.Module, x: Tensor) -> None:
    net.state.data = torch.full((8,), 2.0, dtype=net.state.dtype)


def _one_item(net: nn.Module, x: Tensor) -> None:
    net.state[6] = 2.0


ATTRIBUTES = CHANGES | {
    "counted through its data": lambda net, x: net.state.data.add_(1),
    "one more": lambda net, x: setattr(net, "state", net.state + 1),
    "stepped": _stepped,
    "through its data": _through_data,
    "new data": _new_data,
    "constant data": _constant_data,
    "one item": _one_item,
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("change", ATTRIBUTES)
def test_a_state_may_be_a_buffer_or_a_plain_attribute(change: str, plain: bool) -> None:
    torch.manual_seed(0)
    net = Stateful(ATTRIBUTES[change], (8,))
    with torch.no_grad():
        net.make.weight[:3], net.make.bias[:3], net.state[:] = 0, 0, 1
    state = net.state
    if plain:
        del net.state
        net.state = state
    own = copy.deepcopy(net)
    result = demp_fx.compile(net, torch.randn(3, 6))
    assert result.module.get_parameter("make.weight").shape[0] < 8 or change == "stepped"
    assert net.state is state  # as it was
    assert bool((state == 1).all())
    for _ in range(3):
        x = torch.randn(3, 6)
        torch.testing.assert_close(result.module(x), own(x))
    assert not result.report.warnings


class Listed(Stateful):
    """A state in a list, which is changed before it is read, or afterwards."""

    def __init__(self, first: bool) -> None:
        super().__init__(lambda net, x: None, ())
        self.first, self.kept = first, [torch.ones(5)]

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x) * self.kept[0].add_(int(self.first))
        self.kept[0].add_(int(not self.first))
        return x


def test_states_in_containers_are_put_back() -> None:
    net, x = Listed(first=False), torch.randn(3, 6)
    report = demp_fx.compile(net, x).report
    assert any("holds for a first call only" in line for line in report.warnings)
    assert bool((net.kept[0] == 1).all())


def test_what_tracing_does_not_follow_is_not_laid_to_the_narrowing() -> None:
    net, x = Listed(first=True), torch.randn(3, 6)
    with pytest.raises(VerificationError, match=r"graph that was traced .* with nothing cut"):
        demp_fx.compile(net, x)


def test_a_state_in_python_is_said_to_be_lost() -> None:
    class Warming(Stateful):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * min(self.calls / 10, 1.0)

    net = Warming(lambda net, x: None, ())
    report = demp_fx.compile(net, torch.randn(3, 6)).report
    assert any("holds for a first call only" in line for line in report.warnings)


def test_what_is_only_written_down_is_not_kept() -> None:
    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.features = self[0](x)
            result: Tensor = self[1](self.features)
            return result

    net = Watched(nn.Linear(6, 8), nn.Linear(8, 5))
    with torch.no_grad():
        net[0].weight[:3], net[0].bias[:3] = 0, 0
    net(torch.randn(3, 6))
    narrow = demp_fx.compile(net, torch.randn(3, 6)).module
    assert narrow.get_parameter("0.weight").shape == (5, 6)
    assert narrow(torch.randn(4, 6)).shape == (4, 5)


def test_a_state_that_is_assigned_as_it_was_is_not_written_to() -> None:
    class Positions(nn.Module):
        """Makes its table anew where it is too short."""

        def __init__(self) -> None:
            super().__init__()
            self.make, self.place, self.read = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
            self.register_buffer("table", torch.randn(20, 8))

        def longer(self, length: int) -> Tensor:
            return self.table if length <= len(self.table) else torch.randn(length, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.table = self.longer(x.shape[1])
            result: Tensor = self.read(self.make(x) + self.place(self.table[: x.shape[1]]))
            return result

    torch.manual_seed(0)
    net, x = Positions().double(), torch.randn(2, 4, 6).double()
    with torch.no_grad():
        net.read.weight[:, :3] = 0
    narrow = demp_fx.compile(net, x).module
    assert narrow.get_parameter("make.weight").shape == (5, 6)
    narrow(x).square().sum().backward()  # what is written to is no longer there for gradients
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
