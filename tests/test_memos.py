"""What a forward keeps for the next call on the same sizes is made at each call, for any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import demp_fx


class Located(nn.Module):
    """Adds to each place what is made of its coordinates, once for maps of one size."""

    grid = torch.empty(0)  # the class has one of that name, too
    size: Any = None

    def __init__(self, sizes: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.sizes = sizes
        self.make, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x).relu()
        size = self.sizes(x)
        if self.size != size:
            height, width = x.shape[-2:]
            rows, columns = torch.arange(height, dtype=x.dtype), torch.arange(width, dtype=x.dtype)
            self.grid = (rows[:, None] * width + columns).div(7).sin()
            self.size = size
        result: Tensor = self.read(x + self.grid)
        return result


def half_dead(model: Located) -> Located:
    with torch.no_grad():
        model.make.weight[:4] = 0
        model.make.bias[:4] = 0
        model.read.weight[:, :4] = 0
    return model


SIZES: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape,
    "list of pairs": lambda x: [[x.shape[-2], x.shape[-1]]],
    "tuple": lambda x: (x.size(2), x.size(3)),
    "number": lambda x: x.shape[-2] * 1000 + x.shape[-1],
}


@pytest.mark.parametrize("before", [None, 6, 5])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_map_that_is_kept_for_images_of_one_size(sizes: str, before: int | None) -> None:
    torch.manual_seed(0)
    model = half_dead(Located(SIZES[sizes])).double()
    if before is not None:
        model(torch.randn(2, 3, before, before).double())
    held = dict(vars(model))
    result = demp_fx.compile(model, torch.randn(2, 3, 6, 6).double())
    assert vars(model) == held
    assert result.module.get_parameter("make.weight").shape[0] == 4
    assert not any("sizes" in line for line in result.report.assumptions)
    for side in (6, 9, 4):
        x = torch.randn(3, 3, side, side + 1).double()
        torch.testing.assert_close(result.module(x), model(x), rtol=1e-12, atol=1e-12)


def test_sizes_may_be_compared_one_by_one() -> None:
    class OneByOne(Located):
        def forward(self, x: Tensor) -> Tensor:
            x = self.make(x).relu()
            height, width = x.shape[-2:]
            if self.size is None or self.size[0] != height or self.size[1] != width:
                self.build(height, width, x.dtype)
            result: Tensor = self.read(x + self.grid)
            return result

        def build(self, height: int, width: int, dtype: torch.dtype) -> None:
            self.grid = torch.arange(height * width, dtype=dtype).view(height, width).cos()
            self.size = (height, width)

    torch.manual_seed(0)
    model = half_dead(OneByOne(SIZES["shape"])).double()
    model(torch.randn(2, 3, 6, 6).double())
    result = demp_fx.compile(model, torch.randn(2, 3, 6, 6).double())
    assert model.size == (6, 6)
    for side in (6, 9, 4):
        x = torch.randn(3, 3, side, side + 1).double()
        torch.testing.assert_close(result.module(x), model(x), rtol=1e-12, atol=1e-12)


def test_what_is_kept_in_another_precision_is_no_reason_to_refuse() -> None:
    torch.manual_seed(0)
    model = half_dead(Located(SIZES["shape"]))
    model(torch.randn(2, 3, 6, 6))
    result = demp_fx.compile(model, torch.randn(2, 3, 6, 6))
    assert result.report.verification is not None
    assert result.report.verification.eval_error < 1e-12


class Remembers(Located):
    """Keeps one map for each size that it has met."""

    def __init__(self) -> None:
        super().__init__(lambda x: x.shape)
        self.maps: dict[tuple[int, int], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x).relu()
        size = (x.shape[-2], x.shape[-1])
        if size not in self.maps:
            rows, columns = torch.arange(size[0]), torch.arange(size[1])
            self.maps[size] = (rows[:, None] * size[1] + columns).div(7).sin()
        result: Tensor = self.read(x + self.maps[size])
        return result


def test_maps_that_are_kept_by_size_may_have_been_made_in_single_precision() -> None:
    torch.manual_seed(0)
    model = half_dead(Remembers())
    model(torch.randn(2, 3, 6, 6))
    narrow = demp_fx.compile(model, torch.randn(2, 3, 6, 6)).module
    assert narrow.get_parameter("make.weight").shape[0] == 4
    for size in (6, 9):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(narrow(x), model(x))


def test_a_size_that_is_only_checked_is_not_kept() -> None:
    class Checked(Located):
        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[-2]
            if self.size is None:
                self.size = size
            if self.size != size:
                raise ValueError("another size")
            return super().forward(x)

    torch.manual_seed(0)
    model = half_dead(Checked(SIZES["number"])).double()
    model.size = 6
    x = torch.randn(2, 3, 6, 6).double()
    model.sizes = lambda x: 6
    model.grid = torch.randn(6, 6).double()
    narrow = demp_fx.compile(model, x).module
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_setting_that_is_compared_with_a_size_is_what_it_is() -> None:
    class Windows(nn.Module):
        """Pools over other windows from the first large image on."""

        def __init__(self) -> None:
            super().__init__()
            self.make, self.read, self.side = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), 8

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != self.side:
                self.side = 4
            result: Tensor = self.read(nn.functional.avg_pool2d(self.make(x), self.side, 4))
            return result

    torch.manual_seed(0)
    model = Windows().double()
    x = torch.randn(2, 3, 8, 8).double()
    narrow = demp_fx.compile(model, x).module
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)
    assert model.side == 8
