"""One op on the channel path, behind dead channels: exact for any op, narrower where possible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.stream import FAILED
from tests.ops import others
from tests.ops.functions import FUNCTIONS
from tests.ops.layers import LAYERS
from tests.ops.movement import MOVEMENT
from tests.ops.others import OTHERS
from tests.ops.zero_stays import ZERO_STAYS, Op

CHANNELS, DEAD = 8, (1, 2, 5)
OPS: dict[str, Op] = {**ZERO_STAYS, **OTHERS, **FUNCTIONS, **MOVEMENT}


class OneOp(nn.Module):
    """conv - norm - op - conv, with `DEAD` channels of the norm zeroed, or constant."""

    def __init__(self, op: Op, constant: bool, padding: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op = op
        self.make = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.normal_()
            self.norm.weight[list(DEAD)] = 0
            if not constant:
                self.norm.bias[list(DEAD)] = 0
        self.to(torch.float64).eval()
        with torch.no_grad():
            shape = op(self.norm(self.make(torch.randn(2, 3, 6, 6, dtype=torch.float64)))).shape
        self.read = nn.Conv2d(shape[1], 5, min(3, *shape[2:]), padding=padding).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.op(self.norm(self.make(x))))


def error(model: nn.Module, narrow: nn.Module, training: bool) -> float:
    """Largest relative difference on fresh inputs of another batch size."""
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    a, b = model.train(training)(x), narrow.train(training)(x)
    return float(((a - b).abs().max() / a.abs().max()).detach())


def width(model: nn.Module) -> int:
    return model.get_submodule("make").weight.shape[0]


@pytest.mark.parametrize(
    ("constant", "padding"), [(False, 1), (True, 0), (True, 1)], ids=["zero", "constant", "padded"]
)
@pytest.mark.parametrize("name", OPS)
def test_function_is_kept(name: str, constant: bool, padding: int) -> None:
    is_kept(OneOp(OPS[name], constant, padding))


@pytest.mark.parametrize("constant", [False, True], ids=["zero", "constant"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_kept(name: str, constant: bool) -> None:
    torch.manual_seed(0)
    is_kept(OneOp(LAYERS[name]().double(), constant, 1))


def is_kept(model: nn.Module) -> None:
    """Compile and compare, in both modes."""
    result = demp_fx.compile(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert not any(pin.reason.startswith(FAILED) for pin in result.report.pinned)
    assert error(model, result.module, training=False) < 1e-10
    assert error(model, result.module, training=True) < 1e-10


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("softmax_channels", "_softmax"),
        ("layer_norm", "layer_norm"),
        ("cumsum", "cumsum"),
        ("sort", "sort"),
        ("channel_sum", "sum"),
        ("standardised", "std"),
    ],
)
def test_what_mixes_channels_is_pinned_and_named(name: str, op: str) -> None:
    result = demp_fx.compile(OneOp(OTHERS[name], False, 1), torch.randn(2, 3, 6, 6).double())
    pins = [pin for pin in result.report.pinned if "make.weight[0]" in pin.members]
    assert any(op in pin.op for pin in pins)
    assert all(others.__file__ in str(pin.source) for pin in pins)


@pytest.mark.parametrize("name", ZERO_STAYS)
def test_zeros_are_cut(name: str) -> None:
    model = OneOp(ZERO_STAYS[name], constant=False, padding=1)
    result = demp_fx.compile(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert width(result.module) == CHANNELS - len(DEAD)
    assert result.report.carriers == 0
