"""Tables of positions, of which an input reads as many as it has tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import demp_fx


class Joint(nn.Module):
    """Tokens of a text, without positions, before those of an image; the text is read no more."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(6, 8), nn.Linear(6, 8)
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("places", torch.randn(20, 8))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        count = text.shape[1]
        x = torch.cat([self.text(text), self.image(image)], 1)
        places = self.places[: image.shape[1]]
        x = x + torch.cat([torch.zeros((count, 8), dtype=x.dtype), places])[None]
        x = self.mix(torch.cat([x[:, :count].sin(), x[:, count:]], 1))
        result: Tensor = self.out(x[:, count:])
        return result


def test_tokens_that_nobody_reads_are_as_many_as_the_input_has() -> None:
    torch.manual_seed(0)
    model = Joint().double()
    with torch.no_grad():
        model.mix.weight[:4] = 0
        model.mix.bias[:4] = 0
    inputs = (torch.randn(2, 5, 6).double(), torch.randn(2, 9, 6).double())
    narrow = demp_fx.compile(model, inputs, cuts="always").module
    assert narrow.get_parameter("out.weight").shape == (4, 4)
    others = (torch.randn(3, 7, 6).double(), torch.randn(3, 12, 6).double())
    torch.testing.assert_close(narrow(*others), model(*others), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [2, 4])
def test_a_mask_of_the_samples_that_is_repeated_for_heads_has_no_channels(batch: int) -> None:
    class Heads(nn.Module):
        """Heads in the batch, and a mask of ones that is repeated for each of them."""

        def __init__(self) -> None:
            super().__init__()
            self.value, self.out = nn.Linear(5, 12), nn.Linear(12, 5)
            with torch.no_grad():
                self.value.weight[[0, 1, 2, 3, 5, 8]] = 0
                self.value.bias[[0, 1, 2, 3, 5, 8]] = 0

        def forward(self, x: Tensor) -> Tensor:
            many, length = x.shape[:2]
            mask = torch.ones(many, length, dtype=x.dtype)
            for _ in range(2):
                v = self.value(x).view(many, length, 3, 4).transpose(1, 2)
                v = v.reshape(many * 3, length, 4)
                each = mask.unsqueeze(1).repeat_interleave(3, dim=1).reshape(many * 3, length)
                v = (v @ v.transpose(1, 2) * each[:, None, :]) @ v
                x = x + self.out(v.reshape(many, 3, length, 4).transpose(1, 2).flatten(2))
            return x

    torch.manual_seed(0)
    model = Heads().double()
    x = torch.randn(batch, 7, 5, dtype=torch.float64)
    narrow = demp_fx.compile(model, x, cuts="always").module
    assert narrow.get_parameter("value.weight").shape == (6, 5)
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_map_of_positions_is_as_large_as_the_image() -> None:
    """It is resized, and flattened: its places are no channels that somebody may do without."""

    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
            self.places = nn.Parameter(torch.randn(1, 8, 10, 10))
            self.first, self.out = nn.Parameter(torch.randn(1, 3, 8)), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            size = x.shape[2] // 4, x.shape[3] // 4
            places = F.interpolate(self.places, size=size, mode="bilinear")
            x = self.patch(x).flatten(2).mT + places.flatten(2).mT
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
            x = x + self.mix(x).relu()
            return self.out(x[:, :2]), self.out(x[:, 3:])

    torch.manual_seed(0)
    model = Image().double()
    with torch.no_grad():
        model.out.weight[:, :4] = 0
    narrow = demp_fx.compile(model, torch.randn(2, 3, 16, 16).double(), cuts="always").module
    assert narrow.get_parameter("out.weight").shape == (5, 4)
    for height, width in (16, 16), (8, 24):
        x = torch.randn(2, 3, height, width).double()
        torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("end", [-1, -2, 40])
def test_tokens_of_its_own_that_are_left_out_are_left_out_of_any_input(end: int) -> None:
    class Appended(nn.Module):
        """Three tokens of its own behind those of the input, of which the last are not read."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.embed = nn.Parameter(torch.randn(1, 3, 8)), nn.Linear(6, 8)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.embed(x), self.tokens.expand(x.shape[0], -1, -1)], 1)
            result: Tensor = self.out(x[:, :end]).mean(1)
            return result

    torch.manual_seed(0)
    model = Appended().double()
    with torch.no_grad():
        model.out.weight[:, :4] = 0
    narrow = demp_fx.compile(model, torch.randn(2, 9, 6).double(), cuts="always").module
    kept = 3 + end if end < 0 else 3
    assert narrow.get_parameter("tokens").shape == (1, kept, 4)
    for length in (5, 9, 12, 50):
        x = torch.randn(3, length, 6).double()
        torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


def test_what_is_rolled_as_far_as_the_input_is_long_is_elsewhere_for_another_one() -> None:
    class Rolled(nn.Module):
        """Two tokens of each, the second of which holds less; the last one after half a turn."""

        def __init__(self) -> None:
            super().__init__()
            self.two, self.out = nn.Linear(6, 16), nn.Linear(8, 3)
            with torch.no_grad():
                self.two.weight[:3] = self.two.bias[:3] = 0
                self.two.weight[8:14] = self.two.bias[8:14] = 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(x).reshape(x.shape[0], -1, 8)
            result: Tensor = self.out(x.roll(x.shape[1] // 2, 1)[:, -1])
            return result

    torch.manual_seed(0)
    model = Rolled().double()
    narrow = demp_fx.compile(model, torch.randn(2, 9, 6).double(), cuts="always").module
    assert narrow.get_parameter("out.weight").shape == (3, 5)
    for length in (5, 6, 8, 9, 12):
        x = torch.randn(3, length, 6).double()
        torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_single_token_is_added_to_all_that_another_input_has() -> None:
    class First(nn.Module):
        """Pairs of tokens, to each of which something of the first pair is added."""

        def __init__(self) -> None:
            super().__init__()
            self.make, self.add, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            with torch.no_grad():
                self.add.weight[:5] = self.add.bias[:5] = 0

        def forward(self, x: Tensor) -> Tensor:
            x = F.avg_pool1d(self.make(x).mT, 2).mT
            result: Tensor = self.out(x + self.add(x[:, :1]))
            return result

    torch.manual_seed(0)
    model = First().double()
    narrow = demp_fx.compile(model, torch.randn(2, 2, 6).double(), cuts="always").module
    assert narrow.get_parameter("add.weight").shape == (3, 8)
    for length in (2, 4, 9):
        x = torch.randn(3, length, 6).double()
        torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)
