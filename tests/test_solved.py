"""Systems of equations: right-hand sides are solved one by one, each head with its own matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import demp_fx


class Solves(nn.Module):
    """Attention by a kernel that is solved, as in ridge regression; some of the values are dead."""

    def __init__(self, left: bool, triangular: bool, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.triangular, self.heads = left, triangular, heads
        self.value, self.key, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.value.weight[:4], self.value.bias[:4] = 0, 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        value, key = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                      for f in (self.value, self.key))  # fmt: skip
        kernel = key @ key.transpose(-1, -2) + 9 * torch.eye(x.size(1), dtype=x.dtype)
        value = value if self.left else value.transpose(-1, -2)
        if self.triangular:
            solved = torch.linalg.solve_triangular(
                kernel.tril(), value, upper=False, left=self.left
            )
        else:
            solved = torch.linalg.solve(kernel, value, left=self.left)
        solved = solved if self.left else solved.transpose(-1, -2)
        return self.out(solved.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("triangular", [True, False])
@pytest.mark.parametrize(("heads", "keys"), [(1, 8), (2, 4)])
def test_dead_values_leave_a_system_and_a_dead_head_its_keys(
    left: bool, triangular: bool, heads: int, keys: int
) -> None:
    net = Solves(left, triangular, heads)
    narrow = demp_fx.compile(net, torch.randn(2, 5, 6).double()).module
    x = torch.randn(3, 7, 6).double()
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("value.weight").shape == (4, 6)
    assert narrow.get_parameter("key.weight").shape == (keys, 6)


def test_a_system_over_channels_keeps_them_all() -> None:
    class Whitens(nn.Module):
        """Channels are solved for: each depends on all."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.hidden, self.mix = nn.Linear(6, 8), nn.Parameter(torch.eye(8) + torch.rand(8, 8))
            with torch.no_grad():
                self.hidden.weight[:4], self.hidden.bias[:4] = 0, 0
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.solve(self.mix, self.hidden(x).unsqueeze(-1)).squeeze(-1)

    net, x = Whitens(), torch.randn(2, 6).double()
    result = demp_fx.compile(net, x)
    torch.testing.assert_close(result.module(x), net(x), rtol=1e-12, atol=1e-12)
    assert result.module.get_parameter("hidden.weight").shape == (8, 6)
    assert any("system of equations" in pin.reason for pin in result.report.pinned)
