"""Calibration data: what is a batch, what in it is a target, and what is said of the rest."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.errors import UsageError


class Sum(nn.Module):
    """Two inputs, and an option; two of six hidden units never fire."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        with torch.no_grad():
            self.hidden.bias[:] = torch.tensor([-100.0] * 2 + [100.0] * 4)
        self.double()

    def forward(self, x: Tensor, y: Tensor, twice: bool = False) -> Tensor:
        x = x + y
        return self.head(torch.relu(self.hidden(x + x if twice else x)))


class Single(Sum):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


X = torch.ones(5, 4, dtype=torch.float64)
LABELS, MAPS, INDICES = torch.zeros(5, dtype=torch.int64), X[:, :3], torch.ones_like(X).long()


def left(model: nn.Module, example: Any, calibration: Iterable[Any]) -> int:
    """How many hidden units are left."""
    result = demp_fx.compile(model.eval(), example, calibration=calibration)
    hidden = result.module.get_submodule("hidden")
    assert isinstance(hidden, nn.Linear)
    return hidden.out_features


@pytest.mark.parametrize(
    "batch", [X, (X,), [X], {"x": X}, (X, LABELS), (X, MAPS), ({"x": X}, LABELS),
              {"x": X, "labels": LABELS}, ((X,), MAPS)]
)  # fmt: skip
def test_of_one_input_everything_beside_it_is_a_target(batch: Any) -> None:
    assert left(Single(), X[:2], [batch]) == 4


@pytest.mark.parametrize(
    "batch", [(X, X), (X, INDICES), ((X, X), LABELS), ((X, X), MAPS), (X, X, LABELS),
              {"x": X, "y": X, "labels": LABELS}, ({"x": X, "y": X}, LABELS)]
)  # fmt: skip
def test_of_two_inputs_a_pair_is_both(batch: Any) -> None:
    assert left(Sum(), (X[:2], X[:2]), [batch]) == 4


def test_what_is_no_tensor_may_be_left_out() -> None:
    example = {"x": X[:2], "y": X[:2], "twice": True}
    assert left(Sum(), example, [{"x": X, "y": X}, (X, X)]) == 4
    assert left(Sum(), (X[:2], X[:2], True), [(X, X)]) == 4


def test_batches_without_a_sample_show_nothing() -> None:
    assert left(Single(), X[:2], [X[:0], X]) == 4
    with pytest.raises(UsageError, match="empty"):
        left(Single(), X[:2], [X[:0]])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (X, r"'x' of shape \(4,\), the example inputs of \(2, 4\): .* iterable of batches"),
        ([X[:, :3]], r"does not take the calibration data \(5x3\): RuntimeError"),
        ([{"images": X}], "lacks 'x'"),
        ([X.numpy()], "inputs are to be tensors"),
        (["x.png"], "no tensor as 'x': str"),
        (3, "iterable of batches, not a int"),
    ],
)
def test_what_does_not_fit_is_told(calibration: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        left(Single(), X[:2], calibration)


def test_batches_are_taken_one_at_a_time() -> None:
    """A calibration set need not fit into memory."""
    held: list[weakref.ref[Tensor]] = []
    most = 0

    def data() -> Iterator[Tensor]:
        nonlocal most
        for _ in range(6):
            most = max(most, sum(r() is not None for r in held))
            batch = torch.randn(4, 5)
            held.append(weakref.ref(batch))
            yield batch

    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        model.get_parameter("0.bias")[:3] = -100.0
    report = demp_fx.compile(model, torch.randn(2, 5), calibration=data()).report
    assert report.dead_observed == 3
    assert most <= 3  # the first, which the result is compared on, and the last two
