"""Experts whose weights are stacked in one parameter, however they are computed."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import demp_fx

EXPERTS, WIDTH, HIDDEN = 4, 16, 12
Way = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_einsum(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = torch.einsum("td,edh->teh", x, up).relu()
    return torch.einsum("teh,ehd,te->td", h, down, gate)


def by_bmm(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = torch.bmm(x[None].expand(EXPERTS, -1, -1), up).relu()
    return (torch.bmm(h, down).transpose(0, 1) * gate[..., None]).sum(1)


def by_matmul(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return ((x @ up).relu() @ down * gate.T[..., None]).sum(0)


def one_by_one(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    parts = [(x @ up[e]).relu() @ down[e] * gate[:, e : e + 1] for e in range(EXPERTS)]
    return torch.stack(parts).sum(0)


def the_best(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    weight, index = gate.max(-1)
    h = torch.bmm(x[:, None], up[index]).relu()
    return torch.bmm(h, down[index])[:, 0] * weight[:, None]


class Mixture(nn.Module):
    """`up` makes none of the first five hidden channels in any expert; in each of them some more
    are dead, and the next is not read."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.gate, self.read = (
            nn.Linear(6, WIDTH),
            nn.Linear(WIDTH, EXPERTS),
            nn.Linear(WIDTH, 3),
        )
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.way = way
        with torch.no_grad():
            self.make.weight[:5] = self.make.bias[:5] = 0
            self.up[:, :, :5] = self.down[:, 5] = 0
            for e in range(EXPERTS):
                self.up[e, :, 6 + e] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x).relu()
        return self.read(self.way(x, self.gate(x).softmax(-1), self.up, self.down))


@pytest.mark.parametrize("way", [by_einsum, by_bmm, by_matmul, one_by_one, the_best])
def test_channels_that_no_expert_needs_are_gone(way: Way) -> None:
    result = demp_fx.compile(Mixture(way), torch.randn(5, 6))
    assert result.report.verification is not None
    assert result.report.verification.eval_error < 1e-12
    assert result.module.get_parameter("up").shape == (EXPERTS, WIDTH - 5, HIDDEN - 6)
    assert result.module.get_parameter("down").shape == (EXPERTS, HIDDEN - 6, WIDTH)


def by_groups(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The tokens of each expert beside each other; the kernel takes widths of whole 16 bytes."""
    weight, index = gate.max(-1)
    index, order = index.sort()
    ends = torch.histc(index.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    ends = ends.cumsum(0, dtype=torch.int32)
    h = torch._grouped_mm(x[order], up, offs=ends).relu()
    y = torch._grouped_mm(h, down, offs=ends)
    return y[order.argsort()] * weight[:, None]


def by_groups_of_any_width(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same, where that kernel is not to be had."""
    weight, index = gate.max(-1)
    index, order = index.sort()
    ends = torch.histc(index.to(x.dtype), bins=EXPERTS, min=0, max=EXPERTS - 1).cumsum(0).int()
    multiplied = torch.ops.transformers.grouped_mm_fallback
    y = multiplied(multiplied(x[order], up, ends).relu(), down, ends)
    result: Tensor = y[order.argsort()] * weight[:, None]
    return result


def test_groups_that_are_multiplied_by_transformers() -> None:
    importlib.import_module("transformers.integrations.moe")  # which defines the op
    model, x = Mixture(by_groups_of_any_width).double(), torch.randn(5, 6).double()
    narrow = demp_fx.compile(model, x).module
    assert narrow.get_parameter("up").shape == (EXPERTS, WIDTH - 5, HIDDEN - 6)
    x = torch.randn(9, 6).double()
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no such kernel")
def test_groups_keep_widths_that_their_kernel_takes() -> None:
    model, x = Mixture(by_groups), torch.randn(5, 6)
    result = demp_fx.compile(model, x)
    assert result.report.opaque == {}
    assert result.module.get_parameter("up").shape == (EXPERTS, 12, 8)  # 11 and 6 are needed
    assert result.module.get_parameter("down").shape == (EXPERTS, 8, WIDTH)
    x = torch.randn(9, 6)
    torch.testing.assert_close(result.module(x), model(x))
