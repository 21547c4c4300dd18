"""Axes that are merged into one, all of which get narrower: a cell stays with each of its sides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.analysis import walk
from demp_fx.channels.solve import Solver
from tests.zoo.kill import relative_error

DEAD = slice(None, None, 2)


def branch(channels: int) -> nn.Sequential:
    """Every second channel of it is dead."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight[DEAD] = norm.bias[DEAD] = 0
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), norm, nn.ReLU())


class Products(nn.Module):
    """Every channel of one branch with every one of another, and a layer that reads them all."""

    def __init__(self, width: int = 8 * 12) -> None:
        super().__init__()
        self.first, self.second = branch(8), branch(12)
        self.head = nn.Linear(width, 5)
        self.double().eval()


class Pooled(Products):
    """Bilinear pooling over the places of an image."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).flatten(2), self.second(x).flatten(2)
        return self.head(torch.bmm(a, b.transpose(1, 2)).flatten(1))  # type: ignore[no-any-return]


class Normalised(Products):
    """The same of one branch with itself, by the usual square roots of it."""

    def __init__(self) -> None:
        super().__init__(8 * 8)
        del self.second

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).flatten(2)
        gram = (a @ a.transpose(1, 2)).flatten(1)
        return self.head(F.normalize(gram.sign() * gram.abs().sqrt()))  # type: ignore[no-any-return]


class Outer(Products):
    """By an equation."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).mean((2, 3)), self.second(x).mean((2, 3))
        return self.head(torch.einsum("bi,bj->bij", a, b).reshape(len(a), -1))  # type: ignore[no-any-return]


class Read(Products):
    """By a convolution, at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8 * 12, 5, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        product = self.first(x).unsqueeze(2) * self.second(x).unsqueeze(1)
        return self.head(product.view(b, -1, h, w))  # type: ignore[no-any-return]


class Apart(Products):
    """Merged, scaled cell by cell, and taken apart again."""

    def __init__(self) -> None:
        super().__init__(12)
        self.scale = nn.Parameter(torch.rand(96, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).mean((2, 3)), self.second(x).mean((2, 3))
        cells = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1) * self.scale
        return self.head(cells.view(-1, 8, 12).sum(1))  # type: ignore[no-any-return]


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


KEPT = {Pooled: (5, 24), Normalised: (5, 16), Outer: (5, 24), Read: (5, 24, 3, 3), Apart: (5, 6)}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KEPT)
def test_a_layer_reads_the_cells_of_what_is_alive(kind: type[Products], batch: int) -> None:
    torch.manual_seed(0)
    model = kind()
    narrow = demp_fx.compile(model, images(batch)).module
    x = images(5)
    assert relative_error(narrow(x), model(x)) < 1e-12
    assert narrow.get_parameter("first.0.weight").shape == (4, 3, 3, 3)
    assert narrow.get_parameter("head.weight").shape == KEPT[kind]
    assert kind is not Apart or narrow.get_parameter("scale").shape == (24,)


class Three(nn.Module):
    """Products of three, each with a one beside its channels: those of fewer are in it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([branch(8), branch(6), branch(4)])
        self.head = nn.Linear(9 * 7 * 5, 5)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones(x.shape[0], 1, dtype=x.dtype)
        a, b, c = (torch.cat([one, part(x).mean((2, 3))], 1) for part in self.parts)
        pairs = torch.bmm(a.unsqueeze(2), b.unsqueeze(1)).view(-1, 9 * 7, 1)
        return self.head(torch.bmm(pairs, c.unsqueeze(1)).view(x.shape[0], -1))  # type: ignore[no-any-return]


def test_products_of_products() -> None:
    torch.manual_seed(0)
    model = Three()
    narrow = demp_fx.compile(model, images(3)).module
    x = images(2)
    assert relative_error(narrow(x), model(x)) < 1e-12
    assert narrow.get_parameter("head.weight").shape == (5, 5 * 4 * 3)


@pytest.mark.parametrize("seed", range(8))
def test_a_cell_stays_iff_both_of_its_sides_do(seed: int) -> None:
    torch.manual_seed(seed)
    model = Outer()
    with torch.no_grad():
        for part in (model.first, model.second):
            part[1].weight.copy_(torch.rand(len(part[1].weight)) > 0.6)
            part[1].bias.copy_(part[1].weight)
    system = walk(demp_fx.trace(model, images(2))).system
    solution = Solver(system).solve()
    (product,) = system.products
    first, second = map(solution.kept, product.sides)
    assert solution.kept(product.cells).equal(first & second)
    assert bool(solution.kept(product.cells).any())
