"""Weights that are made for each sample: of experts, of a style, or by another network.

A convolution takes them with the batch in its groups; a product takes a matrix for each sample.
What one axis held, outputs and inputs in one, loses both.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.analysis import walk
from tests.zoo.kill import relative_error

DEAD = slice(None, None, 2)


def per_sample(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, transposed: bool
) -> Tensor:
    """A convolution of each sample with filters of its own, (batch * filters, ...)."""
    b, c, h, w = x.shape
    conv = F.conv_transpose2d if transposed else F.conv2d
    out = conv(x.reshape(1, b * c, h, w), weight, bias, padding=1, groups=groups * b)
    return out.view(b, -1, out.shape[-2], out.shape[-1])


class Experts(nn.Module):
    """Filters of several experts, mixed anew for each sample."""

    def __init__(
        self, inputs: int, outputs: int, flat: bool = False, bias: bool = True,
        depthwise: bool = False, transposed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.groups, self.transposed = inputs if depthwise else 1, transposed
        sides = (inputs, outputs) if transposed else (outputs, inputs // self.groups)
        self.sizes, self.outputs = (*sides, 3, 3), outputs
        weight = torch.randn(3, *self.sizes) / inputs
        self.weight = nn.Parameter(weight.flatten(1) if flat else weight)
        self.bias = nn.Parameter(torch.randn(3, outputs)) if bias else None
        self.route = nn.Linear(inputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        shares = self.route(x.mean((2, 3))).softmax(1)
        rows, columns, *kernel = self.sizes
        weight = torch.mm(shares, self.weight.view(3, -1)).view(b * rows, columns, *kernel)
        bias = None if self.bias is None else torch.mm(shares, self.bias).view(-1)
        return per_sample(x, weight, bias, self.groups, self.transposed)


class Styled(nn.Module):
    """Filters that a style scales and that are normalised again, as in generators of images."""

    def __init__(
        self, inputs: int, outputs: int, normalised: bool = True, transposed: bool = False
    ) -> None:
        super().__init__()
        self.outputs, self.normalised, self.transposed = outputs, normalised, transposed
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, 3, 3) / inputs)
        self.style = nn.Linear(inputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        weight = self.weight * self.style(x.mean((2, 3))).view(b, 1, c, 1, 1)
        if self.normalised:
            norm = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
            weight = weight * norm.view(b, self.outputs, 1, 1, 1)
        if self.transposed:
            weight = weight.transpose(1, 2).reshape(b * c, self.outputs, 3, 3)
        else:
            weight = weight.view(b * self.outputs, c, 3, 3)
        return per_sample(x, weight, None, 1, self.transposed)


class Between(nn.Module):
    """A layer between two norms whose scale and shift are zero for every second channel."""

    def __init__(self, layer: nn.Module, inputs: int = 8, outputs: int = 12) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, inputs, 3, bias=False), nn.BatchNorm2d(inputs)
        self.layer, self.after = layer, nn.BatchNorm2d(outputs)
        self.head = nn.Linear(outputs, 5)
        self.double().eval()
        with torch.no_grad():
            for norm in (self.norm, self.after):
                norm.weight[DEAD] = norm.bias[DEAD] = 0
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.norm(self.stem(x)).relu())
        result: Tensor = self.head(self.after(x).relu().mean((2, 3)))
        return result


def images(batch: int, side: int = 8) -> Tensor:
    return torch.randn(batch, 3, side, side, dtype=torch.float64)


def compiled(model: nn.Module, batch: int = 3) -> nn.Module:
    """The narrow network; it is the original at other batch sizes and resolutions, too."""
    narrow = demp_fx.compile(model, images(batch)).module
    for other in (images(1), images(5, 11)):
        assert relative_error(narrow(other), model(other)) < 1e-12
    return narrow


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_experts_lose_dead_outputs_and_inputs(flat: bool, bias: bool, batch: int) -> None:
    narrow = compiled(Between(Experts(8, 12, flat, bias)), batch)
    weight = narrow.get_parameter("layer.weight")
    assert weight.shape == ((3, 6 * 4 * 9) if flat else (3, 6, 4, 3, 3))
    assert narrow.get_parameter("layer.route.weight").shape == (3, 4)
    assert not bias or narrow.get_parameter("layer.bias").shape == (3, 6)


@pytest.mark.parametrize("flat", [True, False])
def test_depthwise_experts_lose_dead_channels(flat: bool) -> None:
    narrow = compiled(Between(Experts(12, 12, flat, depthwise=True), 12))
    weight = narrow.get_parameter("layer.weight")
    assert weight.shape == ((3, 6 * 9) if flat else (3, 6, 1, 3, 3))


@pytest.mark.parametrize("flat", [True, False])
def test_experts_of_a_transposed_convolution(flat: bool) -> None:
    narrow = compiled(Between(Experts(8, 12, flat, transposed=True)))
    weight = narrow.get_parameter("layer.weight")
    assert weight.shape == ((3, 4 * 6 * 9) if flat else (3, 4, 6, 3, 3))


@pytest.mark.parametrize("transposed", [True, False])
def test_a_style_scales_what_is_left(transposed: bool) -> None:
    narrow = compiled(Between(Styled(8, 12, normalised=False, transposed=transposed)))
    assert narrow.get_parameter("layer.weight").shape == (1, 6, 4, 3, 3)
    assert narrow.get_parameter("layer.style.weight").shape == (4, 4)


@pytest.mark.parametrize("transposed", [True, False])
def test_a_norm_of_filters_needs_all_of_their_inputs(transposed: bool) -> None:
    narrow = compiled(Between(Styled(8, 12, transposed=transposed)))
    assert narrow.get_parameter("layer.weight").shape == (1, 6, 8, 3, 3)
    assert narrow.get_parameter("stem.weight").shape == (4, 3, 3, 3)


def test_what_is_constant_is_folded() -> None:
    model = Between(Experts(8, 12))
    with torch.no_grad():
        model.norm.bias[DEAD] = 0.5
        model.after.bias[DEAD] = 0.5
    narrow = compiled(model)
    assert narrow.get_parameter("layer.weight").shape[1] == 6


# -- what only looks like it ----------------------------------------------------------------------


class OneKernel(nn.Module):
    """The same filters for each group of channels, all of which are others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.repeat(2, 1, 1, 1), padding=1, groups=2)


class Twice(nn.Module):
    """The same channels for each group of filters, all of which are others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 12, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([x, x], 1))  # type: ignore[no-any-return]


class Correlated(nn.Module):
    """Each sample is searched for another one, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernel = x.roll(1, 0)[..., 1:4, 1:4].reshape(b * c, 1, 3, 3)
        out = F.conv2d(x.reshape(1, b * c, h, w), kernel, groups=b * c)
        return self.last(out.view(b, c, h - 2, w - 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", [OneKernel, Twice, Correlated])
def test_other_repetitions(layer: Callable[[], nn.Module]) -> None:
    narrow = compiled(Between(layer()))
    assert narrow.get_parameter("stem.weight").shape[0] < 8
    assert narrow.get_parameter("head.weight").shape == (5, 6)


# -- networks that make the weights of others ------------------------------------------------------


class Made(nn.Module):
    """A linear layer whose weights and bias another layer makes, for each sample."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight, self.bias = nn.Linear(5, 8 * 12), nn.Linear(5, 12)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        if self.how == "one for all":
            return F.linear(x, self.weight(code[0]).view(12, 8), self.bias(code[0]))
        weight, bias = self.weight(code), self.bias(code)
        if self.how == "bmm":
            return torch.bmm(x.unsqueeze(1), weight.view(-1, 8, 12)).squeeze(1) + bias
        if self.how == "bmm from the left":
            return torch.bmm(weight.view(-1, 12, 8), x.unsqueeze(2)).squeeze(2) + bias
        return torch.einsum("bi,boi->bo", x, weight.view(-1, 12, 8)) + bias


class Hyper(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.latent, self.layer = nn.Linear(6, 5), Made(how)
        self.after, self.head = nn.BatchNorm1d(12), nn.Linear(12, 3)
        self.double().eval()
        with torch.no_grad():
            for norm in (self.norm, self.after):
                norm.weight[DEAD] = norm.bias[DEAD] = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(self.norm(self.stem(x)).relu(), self.latent(x))
        return self.head(self.after(hidden).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["one for all", "bmm", "bmm from the left", "einsum"])
def test_a_network_makes_only_the_weights_that_are_used(how: str) -> None:
    model = Hyper(how)
    narrow = demp_fx.compile(model, torch.randn(3, 6, dtype=torch.float64)).module
    x = torch.randn(7, 6, dtype=torch.float64)
    assert relative_error(narrow(x), model(x)) < 1e-12
    assert narrow.get_parameter("layer.weight.weight").shape == (4 * 6, 5)
    assert narrow.get_parameter("layer.bias.weight").shape == (6, 5)


def test_a_weight_over_both_sides_is_linked_to_both() -> None:
    model = Hyper("bmm")
    graph = demp_fx.analyze(demp_fx.trace(model, torch.randn(3, 6, dtype=torch.float64)))
    text = str(graph.explain("layer.weight"))
    assert "block" in text or "layer.weight" in text
    system = walk(demp_fx.trace(model, torch.randn(3, 6, dtype=torch.float64))).system
    assert [p.cells.numel() for p in system.products] == [96]
