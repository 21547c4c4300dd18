"""Weights that are used twice: a constant goes into them where that suits all who use them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import demp_fx
from demp_fx.channels.cuts import Cuts

DEAD = [1, 4, 6]  # of 8 channels; behind the norm they are its shift


class Siamese(nn.Module):
    """Both inputs go through the same layers."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.read = nn.Conv2d(8, 4, 3, padding=padding)
        self.double().eval()
        with torch.no_grad():
            self.norm.weight[DEAD] = 0
            self.norm.bias[DEAD] = torch.tensor([0.5, 1.5, 0.7], dtype=torch.float64)

    def embed(self, x: Tensor) -> Tensor:
        result: Tensor = self.read(self.norm(self.make(x)).relu())
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).mean((2, 3)) - self.embed(x.flip(0)[..., 2:]).mean((2, 3))


class OneScaled(Siamese):
    """One of the two sees other constants."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.make(x)).relu()
        return self.read(hidden) - self.read(2 * hidden)


class OneUnknown(Siamese):
    """One of the two sees no constants at all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) - self.read(self.make(x))


class BiasElsewhere(Siamese):
    """The bias is taken off again."""

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) - 2 * self.read.bias.view(-1, 1, 1)


class WeightElsewhere(Siamese):
    """A part of the weight reads a part of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.make(x)).relu()
        return self.read(hidden) + F.conv2d(hidden[:, :5], self.read.weight[:, :5], padding=1)


def exact(model: nn.Module, cuts: Cuts) -> nn.Module:
    """The narrow module, which computes the same."""
    narrow = demp_fx.compile(model, torch.randn(2, 3, 8, 8).double(), cuts=cuts).module
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    for training in (False, True):
        expected = model.train(training)(x)
        torch.testing.assert_close(narrow.train(training)(x), expected, rtol=1e-10, atol=1e-10)
    return narrow


@pytest.mark.parametrize(("padding", "width"), [(0, 5), (1, 6)])
@pytest.mark.parametrize("cuts", ["pays", "always"])
def test_constants_that_all_readers_see_are_folded_once(
    padding: int, width: int, cuts: Cuts
) -> None:
    narrow = exact(Siamese(padding), cuts)
    assert narrow.get_parameter("read.weight").shape[1] == width
    made = 5 if cuts == "always" else width  # what carries a constant may be put back instead
    assert narrow.get_parameter("make.weight").shape[0] == made


def test_each_call_of_a_layer_has_the_channels_of_all_put_back_that_are_zero_in_it() -> None:
    """A recurrent convolution reads what the one before it makes, and its sum with its own."""

    class Recurrent(nn.Module):
        def __init__(self, dead: list[int]) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            nn.init.uniform_(self.norm.weight)
            self.norm.weight.data[dead] = 0

        def unit(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).relu()

        def forward(self, x: Tensor) -> Tensor:
            return self.unit(x + self.unit(x + self.unit(x)))

    torch.manual_seed(0)
    first, second = Recurrent([0, 1, 2, 3]), Recurrent([2, 3, 4, 5])
    model = nn.Sequential(nn.Conv2d(3, 8, 1), first, second, nn.Conv2d(8, 2, 1)).double().eval()
    narrow = exact(model, "always")
    assert narrow.get_parameter("1.conv.weight").shape == (4, 8, 3, 3)
    assert narrow.get_parameter("2.conv.weight").shape == (4, 6, 3, 3)
    assert narrow.get_parameter("3.weight").shape == (2, 4, 1, 1)


@pytest.mark.parametrize("kind", [OneScaled, OneUnknown, BiasElsewhere])
def test_constants_stay_where_they_would_change_something_else(kind: type[Siamese]) -> None:
    assert exact(kind(), "always").get_parameter("read.weight").shape[1] == 8


def test_constants_stay_where_a_part_of_the_weight_is_read_by_itself() -> None:
    assert exact(WeightElsewhere(padding=1), "always").get_parameter("read.weight").shape[1] == 8


def test_a_bias_takes_constants_though_its_weight_is_an_embedding_too() -> None:
    class Tied(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
            self.head = nn.Linear(8, 9, bias=bias)
            self.head.weight = self.embed.weight
            with torch.no_grad():
                self.norm.weight[DEAD], self.norm.bias[DEAD] = 0, 0.5
            self.double().eval()

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(self.norm(self.embed(tokens)))
            return logits

    for bias in (False, True):
        model, tokens = Tied(bias), torch.randint(9, (2, 5))
        narrow = demp_fx.compile(model, tokens, cuts="always").module
        torch.testing.assert_close(narrow(tokens), model(tokens), rtol=1e-10, atol=1e-10)


class Words(nn.Module):
    """Decides by numbers, and is not looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.kinds = nn.Embedding(20, 8), nn.Embedding(2, 8)

    def forward(self, words: Tensor) -> Tensor:
        if int(words.max()) > 100:
            words = words % 20
        result: Tensor = self.table(words) + self.kinds(words % 2)
        return result


@pytest.mark.parametrize("by_function", [False, True])
def test_a_weight_that_a_module_shares_which_is_not_looked_into_stays(by_function: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = Words(), nn.LayerNorm(8)
            self.read = nn.Linear(8, 20, bias=False)
            self.read.weight = self.words.table.weight
            with torch.no_grad():
                self.norm.weight[:4] = self.norm.bias[:4] = 0

        def forward(self, words: Tensor) -> Tensor:
            x = self.norm(self.words(words))
            return F.linear(x, self.words.table.weight) if by_function else self.read(x)

    torch.manual_seed(0)
    model, words = Tied().double(), torch.randint(20, (2, 5))
    narrow = demp_fx.compile(model, words, cuts="always").module
    assert list(narrow.meta["demp_fx"].opaque) == ["words"]
    torch.testing.assert_close(narrow(words), model(words), rtol=1e-12, atol=1e-12)
