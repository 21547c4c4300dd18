"""Checks of its input in a model's code are taken as passed: a graph is for inputs that fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.errors import TraceError
from tests.zoo import checks
from tests.zoo.checks import CHECKS, DECISIONS

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Checked(nn.Module):
    """A linear layer behind a check."""

    def __init__(self, check: Callable[[Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.check, self.linear = check, nn.Linear(4, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.linear(x)


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_leaves_no_trace_but_a_note(check: Callable[[Tensor], object]) -> None:
    model = Checked(check)
    graph = demp_fx.trace(model, X)
    assert [n.name for n in graph.graph.nodes] == ["x", "linear", "output"]
    torch.testing.assert_close(graph(X), model(X), rtol=0, atol=0)
    notes = graph.meta["demp_fx"]
    assert (notes.exported, notes.opaque) == ("", {})
    assert any(
        str(checks.__file__) in note and note.endswith("taken as passed") for note in notes.baked
    )


def test_modules_that_check_are_seen_through() -> None:
    net = nn.Sequential(Checked(checks.asserts), nn.ReLU(), nn.Linear(6, 2).double())
    with torch.no_grad():
        net[0].linear.weight[:2] = net[0].linear.bias[:2] = 0
    narrow = demp_fx.compile(net, X).module
    assert narrow.get_submodule("0.linear").out_features == 4
    torch.testing.assert_close(narrow(X), net(X), rtol=0, atol=1e-15)


@pytest.mark.parametrize("decision", DECISIONS)
def test_a_decision_is_no_check(decision: Callable[[Tensor], object]) -> None:
    class Decides(Checked):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.check(x))

    with pytest.raises(TraceError, match=str(checks.__file__)):
        demp_fx.trace(Decides(decision), X)


def test_a_function_that_is_called_may_ask_for_a_type() -> None:
    """Python says of who calls it that he is in the middle of an instruction."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.bias = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.attention
            found, _ = nn.functional.multi_head_attention_forward(
                x, x, x, 4, 2, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0,
                a.out_proj.weight, a.out_proj.bias, attn_mask=self.bias(x),
            )  # fmt: skip
            return found

    model = nn.Sequential(Attends(), nn.Linear(4, 2)).double()
    graph = demp_fx.trace(model, X)
    assert (graph.meta["demp_fx"].exported, graph.meta["demp_fx"].opaque) == ("", {})
    torch.testing.assert_close(graph(X), model(X), rtol=1e-12, atol=1e-12)
