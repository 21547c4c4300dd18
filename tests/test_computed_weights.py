"""Weights that a network computes of its parameters, by standardisation above all.

The statistics of a filter are over its inputs: those stay in the parameter, and leave the weight
behind the statistics. Filters are independent: dead ones leave the parameter itself.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.cuts import Cuts
from demp_fx.emit.module import source
from tests.zoo.kill import relative_error

SIZE = (3, 8, 8)
Standardise = Callable[[Tensor], Tensor]


def by_batch_norm(weight: Tensor) -> Tensor:
    rows = weight.reshape(1, weight.shape[0], -1)
    rows = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
    return rows.reshape_as(weight)


def by_var_mean(weight: Tensor) -> Tensor:
    var, mean = torch.var_mean(weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return (weight - mean) / torch.sqrt(var + 1e-6)


def by_mean_and_std(weight: Tensor) -> Tensor:
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    return centred / (weight.std((1, 2, 3), keepdim=True) + 1e-5)


def step_by_step(weight: Tensor) -> Tensor:
    mean = weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    weight = weight - mean
    std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
    return weight / std.expand_as(weight)


def by_layer_norm(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    return F.layer_norm(rows, rows.shape[1:]).view(weight.shape)


WAYS: dict[str, Standardise] = {
    f.__name__: f
    for f in (by_batch_norm, by_var_mean, by_mean_and_std, step_by_step, by_layer_norm)
}


class Conv(nn.Conv2d):
    """A convolution with a standardised weight, and a gain for each filter."""

    def __init__(self, way: str, *sizes: int, groups: int = 1) -> None:
        super().__init__(*sizes, padding=1, groups=groups)
        self.way = WAYS[way]
        self.gain = nn.Parameter(torch.rand(sizes[1], 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gain * self.way(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """The gain goes into the standardisation, with the fan-in, as normaliser-free networks do."""

    def __init__(self, way: str, *sizes: int, groups: int = 1) -> None:
        super().__init__(*sizes, padding=1, groups=groups)
        self.gain = nn.Parameter(torch.rand(sizes[1], 1, 1, 1) + 0.5)
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None,
            weight=(self.gain * self.scale).view(-1), training=True, momentum=0.0, eps=1e-6,
        ).reshape_as(self.weight)  # fmt: skip
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


DEAD = {"a": [0, 1, 4, 5], "b": [2, 5, 8, 11], "c": [0, 3, 4]}


class Network(nn.Module):
    """Three convolutions, the second one in groups, and a head; some filters of each are dead."""

    def __init__(
        self, way: str, groups: int = 1, kill: str = "weight", shift: float = 0.0,
        layer: type[Conv] | type[Scaled] = Conv,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        super().__init__()
        self.a = layer(way, 3, 12, 3)
        self.b = layer(way, 12, 12, 3, groups=groups)
        self.c = layer(way, 12, 6, 3)
        self.head = nn.Linear(6, 4)
        for name, channels in DEAD.items():
            conv = self.get_submodule(name)
            with torch.no_grad():
                conv.get_parameter(kill)[channels] = 0
                conv.get_parameter("bias")[channels] = shift
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.b(F.gelu(self.a(x))))
        return self.head(F.relu(self.c(x)).mean((2, 3)))


def sample(batch: int = 2) -> Tensor:
    return torch.randn(batch, *SIZE, dtype=torch.float64)


def assert_same(model: nn.Module, result: demp_fx.CompileResult) -> None:
    """In both modes, and so are the gradients of all that is left and alive (what is dead and only
    fills a group is no longer read)."""
    x = sample(3)
    for train in (False, True):
        wide, narrow = copy.deepcopy(model).train(train), copy.deepcopy(result.module).train(train)
        expected, found = wide(x), narrow(x)
        assert relative_error(found, expected) <= 1e-10
        expected.square().sum().backward()
        found.square().sum().backward()
        for name, parameter in narrow.named_parameters():
            gradient = wide.get_parameter(name).grad
            assert gradient is not None
            assert parameter.grad is not None
            rows = torch.ones(gradient.size(0), dtype=torch.bool)
            rows[DEAD.get(name.partition(".")[0], [])] = False
            keep = result.plan.keep.get(name, {})
            for dim, kept in keep.items():
                gradient = gradient.index_select(dim, torch.tensor(kept))
            rows = rows[keep[0]] if 0 in keep else rows
            assert relative_error(parameter.grad[rows], gradient[rows]) <= 1e-10, name


def shapes(result: demp_fx.CompileResult) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in result.module.named_parameters()}


@pytest.mark.parametrize("kill", ["weight", "gain"])
@pytest.mark.parametrize("shift", [0.0, 0.7])
@pytest.mark.parametrize("groups", [1, 3, 12], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("way", WAYS)
def test_function_and_gradients_are_kept(way: str, groups: int, shift: float, kill: str) -> None:
    model = Network(way, groups, kill, shift)
    assert_same(model, demp_fx.compile(model, sample(), cuts="always"))


@pytest.mark.parametrize("cuts", ["pays", "never"])
@pytest.mark.parametrize("groups", [1, 3, 12], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("layer", [Conv, Scaled])
def test_so_they_are_with_fewer_cuts(
    layer: type[Conv] | type[Scaled], groups: int, cuts: Cuts
) -> None:
    model = Network("by_var_mean", groups, shift=-0.7, layer=layer)
    assert_same(model, demp_fx.compile(model, sample(), cuts=cuts))


@pytest.mark.parametrize("kill", ["weight", "gain"])
@pytest.mark.parametrize("way", WAYS)
def test_filters_leave_the_parameter_and_inputs_the_weight(way: str, kill: str) -> None:
    model = Network(way, kill=kill)

    result = demp_fx.compile(model, sample(), cuts="always")

    assert shapes(result) == {
        "a.weight": (8, 3, 3, 3), "a.bias": (8,), "a.gain": (8, 1, 1, 1),
        "b.weight": (8, 12, 3, 3), "b.bias": (8,), "b.gain": (8, 1, 1, 1),
        "c.weight": (3, 12, 3, 3), "c.bias": (3,), "c.gain": (3, 1, 1, 1),
        "head.weight": (4, 3), "head.bias": (4,),
    }  # fmt: skip
    positions, taps = 2 * 8 * 8, 9
    dense = 3 * 8 + 8 * 8 + 8 * 3
    assert result.report.macs_after == positions * taps * dense + 2 * 3 * 4


@pytest.mark.parametrize("kill", ["weight", "gain"])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_gain_within_the_statistics_is_seen(groups: int, kill: str) -> None:
    model = Network("", groups, kill, layer=Scaled)

    result = demp_fx.compile(model, sample(), cuts="always")

    assert_same(model, result)
    assert shapes(result)["c.gain"] == (3, 1, 1, 1)
    assert shapes(result)["b.gain"] == ((8 if groups == 1 else 9), 1, 1, 1)


@pytest.mark.parametrize("groups", [1, 3])
def test_what_pays_counts_the_filters_that_leave(groups: int) -> None:
    """The maps are small and few here: the parameters are what is saved."""
    model = Network("by_batch_norm", groups)
    result = demp_fx.compile(model, torch.randn(1, 3, 2, 2, dtype=torch.float64))
    assert len(result.module.get_parameter("a.weight")) < 12
    assert len(result.module.get_parameter("c.weight")) == 3


def test_groups_lose_inputs_of_their_own() -> None:
    model = Network("by_var_mean", groups=3)
    with torch.no_grad():
        for name in ("weight", "bias"):
            model.get_parameter(f"a.{name}")[[8, 10]] = 0

    result = demp_fx.compile(model, sample(), cuts="always")

    (regroup,) = result.plan.regroups
    assert regroup.index == [[2, 3], [2, 3], [1, 3]]
    assert len(result.module.get_parameter("a.weight")) == 6
    assert result.module.get_parameter("b.weight").shape == (9, 4, 3, 3)
    assert_same(model, result)


def test_a_group_without_life_goes() -> None:
    model = Network("by_batch_norm", groups=3)
    with torch.no_grad():
        for name in ("weight", "bias"):
            model.get_parameter(f"b.{name}")[:4] = 0

    result = demp_fx.compile(model, sample(), cuts="always")

    assert len(result.module.get_parameter("a.weight")) == 6  # two zeros are put back
    assert result.module.get_parameter("b.weight").shape == (6, 4, 3, 3)
    x = sample(3)
    assert relative_error(result.module(x), model(x)) <= 1e-10


@pytest.mark.parametrize("groups", [1, 3])
def test_the_plan_replays_and_the_module_is_written_and_pickled(groups: int) -> None:
    model, x = Network("by_batch_norm", groups), sample(3)
    result = demp_fx.compile(model, sample(), cuts="always")
    expected = result.module(x)

    plan = demp_fx.PruningPlan.from_json(result.plan.to_json())
    again = demp_fx.passes.narrow(demp_fx.trace(model, sample()), plan)
    space: dict[str, Any] = {"__name__": "generated"}
    exec(source(result.module), space)
    written = space["model"]()
    written.load_state_dict(result.module.state_dict())
    revived = pickle.loads(pickle.dumps(result.module))

    assert torch.equal(again(x), expected)
    assert torch.equal(revived(x), expected)
    assert relative_error(written.double()(x), expected) <= 1e-10


@pytest.mark.parametrize("groups", [1, 3])
def test_what_dies_later_goes_later(groups: int) -> None:
    model = Network("by_batch_norm", groups)
    first = demp_fx.compile(model, sample(), cuts="always").module
    with torch.no_grad():
        for name in ("weight", "bias"):
            first.get_parameter(f"a.{name}")[-1] = 0
            first.get_parameter(f"c.{name}")[0] = 0

    second = demp_fx.compile(first, sample(), cuts="always").module

    x = sample(3)
    assert relative_error(second(x), first(x)) <= 1e-10
    assert len(second.get_parameter("c.weight")) == len(first.get_parameter("c.weight")) - 1
    if groups == 1:
        assert len(second.get_parameter("a.weight")) == len(first.get_parameter("a.weight")) - 1


class Normalised(nn.Linear):
    """Weight normalisation by hand: rows of unit length, times a gain."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.rand(sizes[1], 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight / (self.weight.norm(dim=1, keepdim=True) + 1e-6)
        return F.linear(x, self.gain * rows, self.bias)


def test_weight_normalisation_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    first, second, third = Normalised(5, 8), Normalised(8, 6), Normalised(6, 3)
    model = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)
    with torch.no_grad():
        first.gain[[0, 3]] = 0
        first.bias[[0, 3]] = 0
        second.gain[[5]] = 0
        second.bias[[5]] = 0
    model.double()
    x = torch.randn(4, 5, dtype=torch.float64)

    narrow = demp_fx.compile(model, x, cuts="always").module

    assert relative_error(narrow(x), model(x)) <= 1e-10
    assert [tuple(narrow.get_parameter(f"{i}.weight").shape) for i in (0, 2, 4)] == [
        (6, 5), (5, 8), (3, 6)
    ]  # fmt: skip


def test_a_weight_that_two_layers_share_keeps_what_either_reads() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.weight = nn.Parameter(torch.randn(5, 8, 3, 3))
            with torch.no_grad():
                for conv, dead in ((self.a, [0, 1, 2]), (self.b, [2, 3])):
                    conv.weight[dead] = 0
                    conv.bias[dead] = 0

        def forward(self, x: Tensor) -> Tensor:
            weight = by_var_mean(self.weight)
            parts = [F.conv2d(F.gelu(layer(x)), weight) for layer in (self.a, self.b)]
            return torch.cat(parts, 1)

    torch.manual_seed(0)
    model = Shared().double()

    narrow = demp_fx.compile(model, sample(), cuts="always").module

    x = sample(3)
    assert relative_error(narrow(x), model(x)) <= 1e-10
    assert narrow.get_parameter("a.weight").shape == (5, 3, 1, 1)
    assert narrow.get_parameter("b.weight").shape == (6, 3, 1, 1)
    assert narrow.get_parameter("weight").shape == (5, 8, 3, 3)


def test_a_parameter_is_not_replaced_by_its_numbers() -> None:
    """What a scale is known to be today is no constant: it is trained."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gamma = nn.Conv2d(3, 8, 1), nn.Parameter(torch.rand(8) + 0.5)
            self.head = nn.Conv2d(8, 4, 3)
            with torch.no_grad():
                self.gamma[[1, 2]] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x) * self.gamma.reshape(1, -1, 1, 1))

    torch.manual_seed(0)
    model = Layer().double()

    narrow = demp_fx.compile(model, sample(), cuts="always").module

    x = sample(3)
    assert relative_error(narrow(x), model(x)) <= 1e-10
    narrow(x).square().sum().backward()
    gamma = narrow.get_parameter("gamma")
    assert gamma.shape == (6,)
    assert gamma.grad is not None
    assert bool((gamma.grad != 0).all())


def _halved(layer: nn.Conv1d, norm: nn.BatchNorm1d) -> None:
    """Half of the channels of two layers made dead, other ones in each quarter."""
    with torch.no_grad():
        dead = [0, 1, 2, 5, 8, 10, 14, 15]
        layer.weight[dead], layer.bias[dead] = 0, 0
        norm.weight[dead], norm.bias[dead] = 0, 0


def _quaternion(p: nn.ParameterList) -> Tensor:
    r, i, j, k = p[0].unbind()
    rows = ([r, -i, -j, -k], [i, r, -k, j], [j, k, r, -i], [k, -j, i, r])
    return torch.cat([torch.cat(row, 1) for row in rows])


def _kronecker(p: nn.ParameterList) -> Tensor:
    return torch.kron(p[0][0], p[1][0]) + torch.kron(p[0][1], p[1][1])


def _train(p: nn.ParameterList) -> Tensor:
    return torch.einsum("oir,rpj->opij", p[0], p[1]).reshape(16, 16)


def _rotated(p: nn.ParameterList) -> Tensor:
    parts = [torch.rot90(p[0], turns, (2, 3)) for turns in range(4)]
    return torch.stack(parts, 1).view(16, 16, 9)


def _orthogonal(p: nn.ParameterList) -> Tensor:
    return torch.linalg.matrix_exp(p[0] - p[0].T)


JOINED: dict[str, tuple[Callable[[nn.ParameterList], Tensor], list[tuple[int, ...]]]] = {
    "quaternion": (_quaternion, [(4, 4, 4)]),
    "kronecker": (_kronecker, [(2, 4, 4), (2, 4, 4)]),
    "tensor train": (_train, [(4, 4, 4), (4, 4, 4)]),
    "rotated": (_rotated, [(4, 16, 3, 3)]),
    "orthogonal": (_orthogonal, [(16, 16)]),
}


@pytest.mark.parametrize("way", JOINED)
def test_a_weight_of_parts_that_stay_loses_channels_behind_what_computes_it(way: str) -> None:
    """Parts that stand in several places of a weight cannot go from one of them."""
    compute, shapes = JOINED[way]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList(torch.randn(shape) for shape in shapes)

        def forward(self, x: Tensor) -> Tensor:
            weight = compute(self.parts)
            weight = weight.unsqueeze(2) if weight.dim() == 2 else weight
            return F.conv1d(x, weight, padding=weight.size(2) // 2)

    torch.manual_seed(3)
    stem, norm, head = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.Conv1d(16, 2, 1)
    net = nn.Sequential(stem, Layer(), norm, nn.ReLU(), head).double()
    _halved(stem, norm)
    x = torch.randn(3, 3, 12).double()
    narrow = demp_fx.compile(net.eval(), x[:1], cuts="always").module
    assert relative_error(narrow(x), net(x)) <= 1e-12
    assert relative_error(narrow.train()(x), net.train()(x)) <= 1e-12
    assert narrow.get_parameter("0.weight").size(0) == 8
    assert narrow.get_parameter("4.weight").size(1) == 8


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_what_leaves_a_weight_under_spectral_norm(kernel: int) -> None:
    """Its largest singular value is that of the whole parameter."""

    def layer(inputs: int, outputs: int) -> nn.Module:
        plain = (
            nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
            if kernel
            else nn.Linear(inputs, outputs)
        )
        return nn.utils.parametrizations.spectral_norm(plain)

    torch.manual_seed(4)
    first, head = (nn.Conv1d(3, 8, 1), nn.Conv1d(6, 2, 1)) if kernel else (
        nn.Linear(3, 8), nn.Linear(6, 2)
    )  # fmt: skip
    net = nn.Sequential(first, layer(8, 6), nn.ReLU(), head).double().eval()
    with torch.no_grad():
        first.weight[:4], first.bias[:4], head.weight[:, :3] = 0, 0, 0
    x = torch.randn(4, 3, 5).double() if kernel else torch.randn(4, 3).double()
    narrow = demp_fx.compile(net, x, cuts="always").module
    assert relative_error(narrow(x), net(x)) <= 1e-12
    assert narrow.get_parameter("0.weight").size(0) == 4
    assert narrow.get_parameter("3.weight").size(1) == 3


@pytest.mark.parametrize("kept", [False, True])
def test_what_leaves_a_weight_whose_norms_are_limited(kept: bool) -> None:
    """A filter that is longer than it may be is made shorter, whatever the others are: that hangs
    on all of its inputs. The parameter itself may be `kept` so, and has to be read as a whole."""

    class Limited(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            if kept:
                self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.4)
                return super().forward(x)
            return F.conv1d(x, self.weight.renorm(2, -3, 0.4), self.bias)

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), Limited(8, 6, 3), nn.BatchNorm1d(6),
        nn.Conv1d(6, 2, 1),
    ).double()  # fmt: skip
    with torch.no_grad():
        net[1].weight[:4] = net[1].bias[:4] = 0
        net[2].weight[::2] = net[2].bias[::2] = 0
        net[3].weight[::2] = net[3].bias[::2] = 0
    x = torch.randn(4, 3, 9).double()
    narrow = demp_fx.compile(net.eval(), x, cuts="always").module
    assert relative_error(narrow(x), net(x)) <= 1e-12
    assert relative_error(narrow.train()(x), net.train()(x)) <= 1e-12
    assert narrow.get_parameter("0.weight").size(0) == (8 if kept else 4)
    assert narrow.get_parameter("2.weight").shape == (3, 8, 3)
    assert narrow.get_parameter("4.weight").size(1) == 3
