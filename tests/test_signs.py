"""A negative constant times a gate that is never negative dies in the ReLU behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import demp_fx

NEGATIVE, POSITIVE = [0, 1, 2, 3], [4, 5]  # constants, of eight hidden channels


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.act = gate, act
        self.a, self.g, self.b = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.a.weight[NEGATIVE + POSITIVE] = 0
            self.a.bias[NEGATIVE] = -0.5
            self.a.bias[POSITIVE] = 0.5

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.act(self.a(x) * self.gate(self.g(x))))
        return result


def _narrow(net: nn.Module) -> nn.Module:
    x = torch.randn(6, 5, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,), cuts="always").module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    return narrow


@pytest.mark.parametrize("gate", [torch.sigmoid, F.hardsigmoid, F.relu, torch.exp, F.softplus])
@pytest.mark.parametrize("act", [F.relu, F.relu6, nn.ReLU(inplace=True), lambda x: x.clamp(min=0)])
def test_negative_constants_go(
    gate: Callable[[Tensor], Tensor], act: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    narrow = _narrow(Gated(gate, act).double())
    assert narrow.get_submodule("b").weight.shape == (3, 4)


@pytest.mark.parametrize(
    ("gate", "act"),
    [(torch.tanh, F.relu), (torch.sigmoid, F.leaky_relu), (torch.sigmoid, F.gelu),
     (lambda x: torch.sigmoid(x) - 0.5, F.relu),
     (torch.sigmoid, lambda x: F.hardtanh(x, -1.0, 1.0))],
)  # fmt: skip
def test_they_stay_behind_another_gate_or_activation(
    gate: Callable[[Tensor], Tensor], act: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    narrow = _narrow(Gated(gate, act).double())
    assert narrow.get_submodule("b").weight.shape == (3, 8)


def test_a_gate_that_is_written_over_is_none() -> None:
    def shifted(x: Tensor) -> Tensor:
        gate = x.sigmoid()
        gate.view(-1).sub_(2.0)
        return gate

    torch.manual_seed(0)
    _narrow(Gated(shifted, F.relu).double())
