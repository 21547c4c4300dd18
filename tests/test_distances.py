"""What zeros do not change: distances, the largest of absolute values; and random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import demp_fx


class Prototypes(nn.Module):
    """Distances of features from some points; `known` of these are zero where the features are."""

    def __init__(self, p: float, known: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.p = p
        self.features, self.points = nn.Linear(4, 8), nn.Parameter(torch.randn(3, 8))
        with torch.no_grad():
            self.features.weight[:4], self.features.bias[:4] = 0, 0
            if known:
                self.points[:, :4] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.features(x), self.points, p=self.p)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, torch.inf])
@pytest.mark.parametrize("known", [True, False])
def test_what_is_zero_on_both_sides_is_in_no_distance(p: float, known: bool) -> None:
    net = Prototypes(p, known)
    narrow = demp_fx.compile(net, torch.randn(2, 4).double(), cuts="never").module
    for rows in (5, 40):  # many are multiplied
        x = torch.randn(rows, 4).double()
        torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("points").size(1) == (4 if known else 8)


@pytest.mark.parametrize("mode", ["use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"])
def test_roots_of_what_was_rounded_are_the_original_ones(mode: str) -> None:
    """Rows far from others and at no distance from themselves."""

    class Near(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)
            with torch.no_grad():
                self.a.weight[:4], self.a.bias[:4] = 0, 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return torch.cdist(x, x.flip(0), compute_mode=mode)

    torch.manual_seed(1)
    net, x = Near().double(), torch.randn(6, 4).double()
    narrow = demp_fx.compile(net, x).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


LARGEST: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax(1, keepdim=True),
    "max": lambda x: x.max(1, keepdim=True).values,
    "unpacked": lambda x: x.max(1, keepdim=True)[0],
    "of all": lambda x: x.max(),
}


@pytest.mark.parametrize("way", LARGEST)
@pytest.mark.parametrize("signed", [False, True])
def test_the_largest_absolute_value_is_none_of_the_zeros(way: str, signed: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            with torch.no_grad():
                self.a.weight[:3], self.a.bias[:3] = 0, 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) - 5
            x = x * (x < -5.5) if signed else x.abs() * (x != -5)
            result: Tensor = self.b(x / (LARGEST[way](x) - 1))
            return result

    torch.manual_seed(1)
    net, x = Scaled().double(), torch.randn(6, 4).double()
    narrow = demp_fx.compile(net, x).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


def test_which_is_the_largest_depends_on_how_many_there_are() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)
            with torch.no_grad():
                self.a.weight[:3], self.a.bias[:3] = 0, 0

        def forward(self, x: Tensor) -> Tensor:
            largest, place = self.a(x).abs().max(1)
            return largest + place

    torch.manual_seed(2)
    net, x = Places().double(), torch.randn(6, 4).double()
    narrow = demp_fx.compile(net, x).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "randn": lambda like: torch.randn(like.shape[0], 8, dtype=like.dtype),
    "rand": lambda like: torch.rand((like.shape[0], 8), dtype=like.dtype).log(),
    "empty": lambda like: torch.empty(like.shape[0], 8, dtype=like.dtype).normal_(),
    "new_empty": lambda like: like.new_empty(like.shape[0], 8).uniform_(-1, 1),
    "logistic": lambda like: _logit(torch.empty(len(like), 8, dtype=like.dtype).uniform_(0.1, 0.9)),
}


def _logit(u: Tensor) -> Tensor:
    return torch.log(u) - torch.log(1 - u)


@pytest.mark.parametrize("way", MADE)
def test_random_numbers_have_the_channels_that_they_meet(way: str) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale, self.b = (
                nn.Linear(4, 8),
                nn.Parameter(torch.ones(8)),
                nn.Linear(8, 2),
            )
            with torch.no_grad():
                self.a.weight[:3], self.a.bias[:3], self.scale[:3] = 0, 0, 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if self.training:
                x = x + MADE[way](x) * self.scale
            result: Tensor = self.b(x)
            return result

    torch.manual_seed(3)
    net, x = Noisy().double().train(), torch.randn(6, 4).double()
    narrow = demp_fx.compile(net, x).module
    assert narrow.get_parameter("scale").shape == (5,)
    assert narrow(x).shape == net(x).shape
    net.scale.detach().zero_()
    narrow.get_parameter("scale").detach().zero_()
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
