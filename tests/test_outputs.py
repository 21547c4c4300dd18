"""Maps that are returned beside what is made of them: channels that are known are put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import demp_fx


class Features(nn.Module):
    """A backbone that returns its maps beside what its head makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.deep, self.last = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        first = self.norm(self.stem(x)).relu()
        second = self.last(self.deep(first)).relu_()
        return {"maps": [first, second], "all": (first, self.head(second))}


def half_dead(shift: float = 0.0) -> Features:
    torch.manual_seed(0)
    model = Features().double()
    with torch.no_grad():
        for norm in (model.norm, model.last):
            norm.weight[::2] = 0
            norm.bias[::2] = shift
    return model


def same(model: nn.Module, narrow: nn.Module, x: Tensor) -> None:
    for training in (False, True):
        found, expected = narrow.train(training)(x), model.train(training)(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.7, -0.7])
def test_channels_that_are_known_are_put_back_behind_what_is_returned(shift: float) -> None:
    model = half_dead(shift)
    result = demp_fx.compile(model, torch.randn(2, 3, 9, 9).double(), cuts="always")
    shapes = {name: tuple(p.shape[:2]) for name, p in result.module.named_parameters()}
    assert shapes["deep.weight"] == (4, 4)
    assert shapes["head.weight"] == (5, 4)
    same(model, result.module, torch.randn(3, 3, 12, 11).double())


def test_nothing_is_put_back_where_the_graph_may_not_be_cut() -> None:
    model = half_dead()
    result = demp_fx.compile(model, torch.randn(2, 3, 9, 9).double(), cuts="never")
    assert result.module.get_parameter("deep.weight").shape[:2] == (8, 8)


def test_the_last_layer_keeps_its_rows() -> None:
    """Heads begin at zero, and are to be trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    with torch.no_grad():
        model[2].weight[:4] = 0
        model[2].bias[:4] = 0
    result = demp_fx.compile(model, torch.randn(2, 6).double(), cuts="always")
    assert result.module.get_parameter("2.weight").shape == (10, 64)
