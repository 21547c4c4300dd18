"""Running a module in float64 without a copy of its weights in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import demp_fx
from demp_fx.inputs import Inputs
from demp_fx.passes import doubled
from demp_fx.passes.calls import run, runs
from demp_fx.passes.sides import difference

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 7),
    "no bias": lambda: nn.Linear(12, 7, bias=False),
    "tokens": lambda: nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Linear(4, 9)),
    "embedding": lambda: nn.Sequential(_Tokens(), nn.Embedding(5, 8)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 8, 3)),
    "grouped": lambda: nn.Sequential(nn.Unflatten(1, (4, 3)), nn.Conv1d(4, 8, 3, groups=2)),
    "transposed": lambda: nn.Sequential(nn.Unflatten(1, (4, 3)), nn.ConvTranspose1d(4, 6, 3)),
    "attention": lambda: nn.TransformerEncoderLayer(12, 2, 16),
    "prelu": lambda: nn.Sequential(nn.Linear(12, 6), nn.PReLU(6)),
    "matrix": lambda: _Matrix(),
}


class _Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).long().sum(1, keepdim=True) % 5


class _Matrix(nn.Module):
    """A parameter that is added to a product, and is multiplied itself."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(12, 12)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.addmm(self.left, self.left, self.right)


class _Clipped(nn.Module):
    """A layer that writes into its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.5, 0.5)
        return x @ self.weight


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("part", [1, 20, 1 << 20])
def test_converting_weights_in_parts_changes_nothing(
    name: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubled, "PART", part)
    module, inputs = MODULES[name]().eval(), Inputs.of(torch.randn(4, 12))
    found = run(module, inputs, training=False, precision="ops")
    assert found.dtype == torch.float64
    assert difference(run(module, inputs, training=False, precision="whole"), found) < 1e-14
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_who_writes_into_a_weight_is_given_a_copy() -> None:
    module, x = _Clipped(), torch.randn(4, 12)
    before = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="a weight would be changed"):
        run(module, Inputs.of(x), training=False)
    demp_fx.passes.verify(module, module, x)
    assert torch.equal(module.weight, before)


class _WithConstant(nn.Module):
    """A fourth of the channels is dead; `constant` computes with what it makes anew each time."""

    def __init__(self, constant: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.make, self.read, self.constant = nn.Linear(12, 8), nn.Linear(width, 2), constant
        with torch.no_grad():
            self.make.weight[:2] = self.make.bias[:2] = 0

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.read(self.constant(self.make(x)))
        return result


def test_constants_made_in_forward_are_converted() -> None:
    """Code under `tensordot` asks both sides for one dtype."""
    model = _WithConstant(lambda x: torch.tensordot(x, torch.ones(8, 3), dims=([1], [0])), 3)
    result = demp_fx.compile(model, torch.randn(4, 12))
    assert result.report.verification.eval_error < 1e-14
    assert result.module.make.weight.shape == (6, 12)


def test_a_constant_of_a_coarser_dtype_is_no_difference() -> None:
    """A window that the original makes in float32, or in float64 while it is compared."""
    model = _WithConstant(lambda x: x * torch.hann_window(5)[1:2].to(x), 8).double()
    result = demp_fx.compile(model, torch.randn(4, 12).double())
    assert 1e-9 < result.report.verification.eval_error < 1e-6
    assert result.module.make.weight.shape == (6, 12)


class _Copies(TorchDispatchMode):
    """Counts the copies that are made of tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy):
            self.count += tuple(out.shape) == self.shape
        return out


@pytest.mark.parametrize(("precision", "copies"), [("ops", 0), ("whole", 1)])
def test_weights_are_not_copied_to_see_whether_a_call_has_changed_them(
    precision: Any, copies: int
) -> None:
    layer, x = nn.Linear(12, 7), Inputs.of(torch.randn(2, 12))
    with _Copies((7, 12)) as seen:
        assert len(runs(layer, x, False, precision)) == 1
    assert seen.count == copies


def test_a_weight_that_a_call_writes_to_is_a_state() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.add_(1.0)
            return x @ self.weight

    first, second = runs(Counting(), Inputs.of(torch.ones(2, 3)), False, "whole")
    assert first.unique().tolist() == [3.0]
    assert second.unique().tolist() == [6.0]
