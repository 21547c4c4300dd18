"""Heads, groups, shuffles, norms over channels: exact, and as narrow as they can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import demp_fx
from demp_fx.channels.cuts import Cuts
from tests.zoo import structures
from tests.zoo.kill import relative_error
from tests.zoo.mixing import MIXING

STRUCTURES = structures.STRUCTURES | MIXING


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = STRUCTURES[name][0]().double().eval()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return model


def sample(name: str, batch: int) -> Tensor:
    return torch.randn(batch, *STRUCTURES[name][1], dtype=torch.float64)


@pytest.mark.parametrize("cuts", ["pays", "always", "never"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_function_and_gradients_are_kept(name: str, cuts: Cuts) -> None:
    model, x = build(name), sample(name, 3)

    narrow = demp_fx.compile(model, sample(name, 2), cuts=cuts).module

    assert relative_error(narrow(x), model(x)) <= 1e-10
    assert relative_error(narrow.train()(x), model.train()(x)) <= 1e-10
    narrow(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in narrow.parameters())


@pytest.mark.parametrize("name", STRUCTURES)
def test_it_gets_as_narrow_as_it_can(name: str) -> None:
    model = build(name)

    state = demp_fx.compile(model, sample(name, 2), cuts="always").module.state_dict()

    for key, shape in STRUCTURES[name][2].items():
        tensor = state[key] if key in state else state[f"{key}.weight"]
        assert tuple(tensor.shape) == shape, key


@pytest.mark.parametrize("name", ["attention", "grouped", "channel shuffle", "fused, unbind"])
def test_a_plan_replays_on_the_dense_checkpoint(name: str) -> None:
    model, x = build(name), sample(name, 3)
    result = demp_fx.compile(model, sample(name, 2), cuts="always")
    plan = demp_fx.PruningPlan.from_json(result.plan.to_json())

    again = demp_fx.passes.narrow(demp_fx.trace(build(name), sample(name, 2)), plan)

    assert torch.equal(again(x), result.module(x))


def test_the_moments_of_a_grouped_convolution_are_cut_as_its_weights() -> None:
    model, x = build("grouped").train(), sample("grouped", 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    for layer, channels in (("a", [0, 1, 2, 3, 5]), ("norm", [0, 4, 5])):  # the step woke them
        for p in model.get_submodule(layer).parameters():
            with torch.no_grad():
                p[channels] = 0
            optimizer.state[p]["momentum_buffer"][channels] = 0
    before = {id(p): optimizer.state[p]["momentum_buffer"] for p in model.parameters()}

    result = demp_fx.compile(model, sample("grouped", 2), optimizer=optimizer, cuts="never")

    weight = result.module.get_parameter("b.weight")
    moments = optimizer.state[weight]["momentum_buffer"]
    keep, grouped = result.plan.keep.get("b.weight", {}), result.plan.grouped.get("b.weight")
    dense = before[id(model.get_parameter("b.weight"))]
    assert moments.shape == weight.shape
    kept = dense[keep[0]] if 0 in keep else dense
    size = len(kept) // (len(grouped) if grouped else 1)
    for row, filters in enumerate(kept):
        columns = grouped[row // size] if grouped else range(dense.shape[1])
        assert torch.equal(moments[row], filters[list(columns)])


OF_INPUTS: dict[str, Callable[[], nn.Sequential]] = {
    "layer": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)),
    "batch": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Conv1d(6, 4, 1)),
    "group": lambda: nn.Sequential(nn.GroupNorm(3, 6), nn.Conv1d(6, 4, 1)),
    "root mean square": lambda: nn.Sequential(ScaledRMSNorm(6), nn.Linear(6, 4)),
    "by hand": lambda: nn.Sequential(HandmadeNorm(6), nn.Linear(6, 4)),
}


class ScaledRMSNorm(nn.RMSNorm):
    """Shifted as well."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class HandmadeNorm(nn.LayerNorm):
    """Its scale is computed of several."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.offset = nn.Buffer(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
        return x * (self.offset * self.weight) + self.bias


@pytest.mark.parametrize("norm", OF_INPUTS)
def test_of_inputs_that_a_norm_scales_to_zero_nobody_reads_the_rest(norm: str) -> None:
    torch.manual_seed(0)
    model = OF_INPUTS[norm]().double()
    with torch.no_grad():
        model[0].weight[[0, 2, 3]] = 0
        model[0].bias.normal_()

    narrow = demp_fx.compile(model, torch.randn(2, 6, 6).double()).module

    assert narrow.get_parameter("1.weight").shape[1] == 3
    x = torch.randn(5, 6, 6).double()
    for training in (False, True):
        found, expected = narrow.train(training)(x), model.train(training)(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_of_which_there_may_be_none_have_the_channels_of_the_others(registers: int) -> None:
    class Registers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.tokens = nn.Parameter(torch.randn(registers, 8))
            with torch.no_grad():
                self.head.weight[:, ::2] = 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            tokens = self.tokens.reshape(registers, 8).expand(x.shape[0], -1, -1)
            x = torch.cat((tokens, x), 1)
            tokens, x = x[:, :registers], x[:, registers:]
            result: Tensor = self.head(torch.cat((x, tokens.relu()), 1))
            return result

    torch.manual_seed(0)
    net = Registers().double()
    narrow = demp_fx.compile(net, torch.randn(2, 6, 5).double()).module
    assert narrow.get_parameter("tokens").shape == (registers, 4)
    x = torch.randn(3, 7, 5).double()
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: torch.zeros(x.size(0), 8, dtype=x.dtype),
    "new_zeros": lambda x: x.new_zeros(x.size(0), 8),
    "full": lambda x: torch.full((x.shape[0], 8), 0.0, dtype=x.dtype),
}


@pytest.mark.parametrize("state", STATES)
def test_the_first_state_of_a_loop_has_the_channels_that_it_meets(state: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.u, self.o = nn.Linear(6, 24), nn.Linear(8, 24), nn.Linear(8, 3)
            with torch.no_grad():
                for layer in (self.i, self.u):
                    layer.weight.view(3, 8, -1)[:, ::2] = 0
                    layer.bias.view(3, 8)[:, ::2] = 0

        def forward(self, x: Tensor) -> Tensor:
            h = STATES[state](x)
            for step in range(3):
                a, b = self.i(x[:, step]).chunk(3, -1), self.u(h).chunk(3, -1)
                reset, update = (a[0] + b[0]).sigmoid(), (a[1] + b[1]).sigmoid()
                h = (1 - update) * (a[2] + reset * b[2]).tanh() + update * h
            result: Tensor = self.o(h)
            return result

    torch.manual_seed(0)
    net = Gated().double()
    narrow = demp_fx.compile(net, torch.randn(2, 3, 6, dtype=torch.float64)).module
    assert narrow.get_submodule("u").weight.shape == (12, 4)
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


def test_a_first_state_that_is_convolved_has_the_channels_of_the_kernel() -> None:
    class Memory(nn.Module):
        """A memory that goes up through the layers at each step, and on to the next step."""

        def __init__(self) -> None:
            super().__init__()
            self.x = nn.ModuleList(nn.Conv2d(3, 8, 1) for _ in range(2))
            self.m = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
            self.head = nn.Conv2d(8, 2, 1)
            with torch.no_grad():
                for layer in (*self.x, *self.m):
                    layer.weight[::2], layer.bias[::2] = 0, 0

        def forward(self, x: Tensor) -> Tensor:
            batch, steps, _, *space = x.shape
            memory = torch.zeros([batch, 8, *space], dtype=x.dtype)
            for step in range(steps):
                for new, old in zip(self.x, self.m, strict=True):
                    memory = (new(x[:, step]) + old(memory)).tanh()
            result: Tensor = self.head(memory)
            return result

    torch.manual_seed(0)
    net = Memory().double()
    narrow = demp_fx.compile(net, torch.randn(2, 3, 3, 5, 5).double()).module
    assert narrow.get_parameter("m.0.weight").shape == (4, 4, 3, 3)
    x = torch.randn(1, 3, 3, 7, 6).double()
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["list", "buffer", "arange", "mirrored"])
@pytest.mark.parametrize("cuts", ["never", "pays", "always"])
def test_one_channel_that_is_picked_by_its_number(way: str, cuts: Cuts) -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.one, self.all = nn.Linear(5, 6), nn.Linear(1, 2), nn.Linear(6, 2)
            self.register_buffer("number", torch.tensor([3]))
            with torch.no_grad():
                self.make.weight[[0, 2]] = self.make.bias[[0, 2]] = 0

        def forward(self, x: Tensor) -> Tensor:
            h = self.make(x).relu()
            picked = {
                "list": lambda: h[:, [3]],
                "buffer": lambda: h.index_select(1, self.number),
                "arange": lambda: h.index_select(1, torch.arange(h.shape[1])[3:4]),
                "mirrored": lambda: h.flip(1)[:, 2:3],
            }[way]()
            result: Tensor = self.one(picked) + self.all(h)
            return result

    torch.manual_seed(0)
    model, x = Picks().double(), torch.randn(3, 5, dtype=torch.float64)
    narrow = demp_fx.compile(model, x, cuts=cuts, verify=False).module
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_filters_that_are_zero_in_each_group_go(kind: Any, shift: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(3, 8, 1), nn.ReLU(), kind(8, 12, 3, groups=2), nn.ReLU(), nn.Conv1d(12, 4, 1)
    ).double()
    layer = net[2]
    outputs = layer.weight if kind is nn.Conv1d else layer.weight.unflatten(0, (2, 4))
    with torch.no_grad():
        if kind is nn.Conv1d:
            outputs[[0, 1, 7, 9]] = 0
        else:
            outputs[0][:, [0, 1]] = outputs[1][:, [1, 3]] = 0
        layer.bias[[0, 1, 7, 9]] = shift
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    result = demp_fx.compile(net, x)
    assert result.module.get_parameter("2.bias").shape == (8,)
    torch.testing.assert_close(result.module(x), net(x), rtol=0, atol=1e-12)


class SeveralPlaces(nn.Module):
    """A layer reads each of 8 channels at 4 places: two of them at none, and two at some."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.make, self.read = way, nn.Conv1d(3, 8, 1), nn.Linear(32, 5)
        place = torch.arange(32).unflatten(0, (8, 4) if way == "flattened" else (4, 8))
        place = place if way == "flattened" else place.T
        with torch.no_grad():
            self.read.weight[:, torch.cat([place[:2].flatten(), place[2:4, :3].flatten()])] = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.make(x).relu()
        h = h.flatten(1) if self.way == "flattened" else h[..., 0].repeat(1, 4)
        result: Tensor = self.read(h)
        return result


@pytest.mark.parametrize("way", ["flattened", "repeated"])
def test_single_places_of_a_channel_that_nobody_reads_are_not_multiplied(way: str) -> None:
    torch.manual_seed(0)
    model, x = SeveralPlaces(way).double(), torch.randn(3, 3, 4, dtype=torch.float64)
    for cuts, left in (("always", 2 + 16), ("never", 24)):
        narrow = demp_fx.compile(model, x, cuts=cuts).module
        assert narrow.get_parameter("make.weight").shape == (6, 3, 1)
        assert narrow.get_parameter("read.weight").shape == (5, left)
        torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_inputs_that_no_filter_of_their_group_hears_go(kind: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), kind(8, 12, 3, groups=2), nn.Conv1d(12, 4, 1)
    ).double()
    layer = net[2]
    with torch.no_grad():
        if kind is nn.Conv1d:
            layer.weight[:6, [0, 1]] = layer.weight[6:, [1, 3]] = 0
        else:
            layer.weight[[0, 1, 5, 7]] = 0
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    result = demp_fx.compile(net, x)
    assert result.module.get_parameter("0.weight").shape == (4, 3, 1)
    assert result.module.get_parameter("1.weight").shape == (4,)
    torch.testing.assert_close(result.module(x), net(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("inputs", "groups"), [(6, 6), (6, 3)])
def test_filters_of_a_grouped_convolution_of_the_input_go(inputs: int, groups: int) -> None:
    """Each group keeps its inputs, which no parameter makes, and as many filters as the others."""
    torch.manual_seed(0)
    first = nn.Conv1d(inputs, 24, 3, groups=groups)
    net = nn.Sequential(first, nn.BatchNorm1d(24), nn.ReLU(), nn.Conv1d(24, 2, 1)).double()
    each = 24 // groups
    dead = [group * each + k for group in range(groups) for k in range(each // 2 + group % 2)]
    with torch.no_grad():
        net[1].weight[dead] = net[1].bias[dead] = 0
    x = torch.randn(4, inputs, 9).double()
    narrow = demp_fx.compile(net.eval(), x, cuts="always").module
    assert relative_error(narrow(x), net(x)) <= 1e-12
    assert relative_error(narrow.train()(x), net.train()(x)) <= 1e-12
    assert narrow.get_parameter("0.weight").shape == (12, inputs // groups, 3)
    assert narrow.get_parameter("3.weight").size(1) == 24 - len(dead)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_heads_that_a_convolution_takes_for_samples(kind: Any, groups: int) -> None:
    """Attention that pools its queries and keys: what is at one place in all heads is one channel.
    Elsewhere heads lose channels of their own."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(6, 16), nn.Linear(16, 3)
            self.pool = kind(8, 8, 3, padding=1, groups=groups, bias=False)
            for head, dead in enumerate(([0, 1, 5, 6], [1, 2, 4, 5])):
                for place in dead:
                    nn.init.zeros_(self.make.weight[8 * head + place])
                    nn.init.zeros_(self.make.bias[8 * head + place])

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, _ = x.shape
            q = self.make(x).reshape(batch, tokens, 2, -1).permute(0, 2, 1, 3)
            q = q.reshape(batch * 2, 3, 3, q.shape[-1]).permute(0, 3, 1, 2)
            q = self.pool(q).reshape(batch, 16, tokens).transpose(1, 2)
            result: Tensor = self.read(q)
            return result

    torch.manual_seed(0)
    model = Pooled().double()
    x = torch.randn(3, 9, 6).double()
    narrow = demp_fx.compile(model, x[:2], cuts="always").module
    assert relative_error(narrow(x), model(x)) <= 1e-12
    assert narrow.get_parameter("make.weight").size(0) == 8
    assert narrow.get_submodule("pool").in_channels == 6


def test_a_grouped_convolution_that_is_called_as_a_function() -> None:
    class Grouped(nn.Module):
        """Each group loses an input and a filter, and not the same ones."""

        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1)
            self.weight = nn.Parameter(torch.randn(16, 4, 3, 3))
            with torch.no_grad():
                self.make.weight[[0, 5, 10, 15]] = self.make.bias[[0, 5, 10, 15]] = 0
                self.weight[[1, 4, 9, 14]] = 0

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(self.make(x).relu(), self.weight, None, 1, 1, 1, 4)
            result: Tensor = self.read(x.relu())
            return result

    torch.manual_seed(0)
    model = Grouped().double()
    narrow = demp_fx.compile(model, torch.randn(2, 3, 6, 6).double()).module
    assert narrow.get_parameter("weight").shape == (12, 3, 3, 3)
    x = torch.randn(3, 3, 7, 7).double()
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_copy_of_a_table_is_seen_in_the_layout_that_it_has() -> None:
    class Positions(nn.Module):
        """The table is repeated in time, which is written out before it is flattened."""

        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(3, 8), nn.Linear(8, 2)
            self.space = nn.Parameter(torch.randn(4, 8))
            with torch.no_grad():
                self.make.weight[[1, 4]] = self.make.bias[[1, 4]] = 0
                self.space[:, [1, 4]] = 0

        def forward(self, x: Tensor) -> Tensor:
            table = self.space.expand(3, 4, 8).clone().view(12, 8)
            result: Tensor = self.read((self.make(x) + table).relu())
            return result

    torch.manual_seed(0)
    model, x = Positions().double(), torch.randn(2, 12, 3, dtype=torch.float64)
    narrow = demp_fx.compile(model, x).module
    assert narrow.get_parameter("space").shape == (4, 6)
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


def test_parts_of_a_split_attention_lose_channels_of_their_own() -> None:
    class SplitAttention(nn.Module):
        """The weights of both halves sum to one for each channel; a half may lack that channel."""

        def __init__(self) -> None:
            super().__init__()
            self.make, self.weigh, self.read = nn.Linear(3, 12), nn.Linear(6, 12), nn.Linear(6, 2)
            with torch.no_grad():
                self.make.weight[[0, 1, 8]] = self.make.bias[[0, 1, 8]] = 0

        def forward(self, x: Tensor) -> Tensor:
            halves = torch.split(self.make(x).relu(), 6, dim=1)
            share = self.weigh(sum(halves)).view(-1, 2, 6).softmax(1).reshape(-1, 12)  # type: ignore[arg-type]
            weights = torch.split(share, 6, dim=1)
            result: Tensor = self.read(weights[0] * halves[0] + weights[1] * halves[1])
            return result

    torch.manual_seed(0)
    model, x = SplitAttention().double(), torch.randn(5, 3, dtype=torch.float64)
    narrow = demp_fx.compile(model, x, cuts="always").module
    assert narrow.get_parameter("make.weight").shape == (9, 3)
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


class Taps(nn.Module):
    """A convolution as one sum over channels and positions of a kernel, which may be scaled."""

    def __init__(self, scaled: bool, shift: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.read = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 2, 1)
        self.weight = nn.Parameter(torch.randn(6, 12, 3, 3))
        self.scale = nn.Parameter(torch.rand(9, 1)) if scaled else 2.0
        with torch.no_grad():
            self.make.weight[[1, 4, 6]] = 0
            self.make.bias[[1, 4, 6]] = shift
            self.weight[2] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.make(x).relu()
        taps = F.unfold(h, 3, padding=1).unflatten(1, (h.shape[1], 9)) * self.scale
        out = torch.einsum("bckn,ock->bon", taps, self.weight.flatten(2))
        result: Tensor = self.read(out.unflatten(2, x.shape[2:]).relu())
        return result


@pytest.mark.parametrize("cuts", ["pays", "always"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("scaled", [False, True])
def test_channels_that_are_summed_with_positions_of_a_kernel_go(
    scaled: bool, shift: float, cuts: Cuts
) -> None:
    model = Taps(scaled, shift)
    narrow = demp_fx.compile(model, torch.randn(2, 3, 5, 5).double(), cuts=cuts).module
    left = 12 if shift else 9  # a constant is another one at the border
    assert narrow.get_parameter("weight").shape == (5, left, 3, 3)
    x = torch.randn(3, 3, 7, 7).double()
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_channels_that_are_flattened_with_the_places_of_a_grid_go(shift: float) -> None:
    """Radial functions around the points of a grid, for each channel, as one layer's inputs."""

    class Radial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8 * 5, 2)
            self.grid = nn.Parameter(torch.linspace(-2, 2, 5), requires_grad=False)
            with torch.no_grad():
                self.a.weight[:3], self.a.bias[:3] = 0, shift
                self.b.weight.view(2, 8, 5)[:, 6:] = 0

        def forward(self, x: Tensor) -> Tensor:
            bases = torch.exp(-((self.a(x)[..., None] - self.grid) ** 2))
            result: Tensor = self.b(bases.view(*bases.shape[:-2], -1))
            return result

    torch.manual_seed(0)
    net, x = Radial().double(), torch.randn(3, 7, 4).double()
    narrow = demp_fx.compile(net, x[:1]).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("b.weight").size(1) < 7 * 5


@pytest.mark.parametrize("cuts", ["always", "never"])
def test_channels_that_are_joined_with_an_image_are_cut_behind_the_norm_of_both(cuts: Cuts) -> None:
    """The image's channels have no name until a scale gives them one: from there on, one reader
    may do without what another one needs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(11)
            self.a, self.other, self.b = (
                nn.Conv2d(11, 4, 1),
                nn.BatchNorm2d(11),
                nn.Conv2d(11, 4, 1),
            )
            with torch.no_grad():
                self.norm.weight[0] = self.norm.bias[0] = 0
                self.a.weight[:, 1:4] = 0
                self.other.weight[4:9], self.other.bias[4:9] = 0, 0

        def forward(self, image: Tensor) -> Tensor:
            x = self.norm(torch.cat([self.stem(image), image], 1)).relu()
            y: Tensor = self.a(x) + self.b(self.other(F.max_pool2d(x, 1)))
            return y

    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(4, 3, 6, 6).double()
    narrow = demp_fx.compile(net, x, cuts=cuts).module
    for train in (False, True):
        assert relative_error(narrow.train(train)(x), net.train(train)(x)) <= 1e-12
    assert len(narrow.get_parameter("norm.weight")) == 10
    if cuts == "always":
        assert narrow.get_parameter("a.weight").shape[1] == 7
        assert narrow.get_parameter("other.weight").shape == (5,)


@pytest.mark.parametrize("cuts", ["always", "pays", "never"])
@pytest.mark.parametrize("order", ["as they are", "mixed", "some"])
def test_layers_that_pick_of_all_features_so_far(order: str, cuts: Cuts) -> None:
    """Channels are named by their numbers, also where these are all of them in their order; the
    features of all layers are joined, and each reader needs others of them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.side = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
            self.read = nn.Conv2d(40, 4, 1)
            sizes = [8 * k // (2 if order == "some" else 1) for k in (1, 2, 3, 4)]
            self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in sizes)
            self.layers = nn.ModuleList(nn.Conv2d(n, 8, 1) for n in sizes)
            with torch.no_grad():
                self.read.weight[:, torch.randperm(40)[:20]] = 0
                for k, norm in enumerate(self.norms):
                    n = 8 * (k + 1)
                    picked = torch.arange(n) if order == "as they are" else torch.randperm(n)
                    self.register_buffer(f"index{k}", picked[: sizes[k]].clone())
                    dead = torch.randperm(sizes[k])[: sizes[k] // 2]
                    norm.weight[dead] = norm.bias[dead] = 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            sides = []
            for k, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
                picked = torch.index_select(x, 1, self.get_buffer(f"index{k}"))
                y = layer(norm(picked).relu())
                sides.append(self.side(y))
                x = torch.cat([x, y], 1)
            out: Tensor = self.read(x) + sum(sides)
            return out

    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(4, 3, 6, 6).double()
    result = demp_fx.compile(net, x, cuts=cuts)
    narrow = result.module
    for train in (False, True):
        assert relative_error(narrow.train(train)(x), net.train(train)(x)) <= 1e-12
    assert not any("another size" in pin.reason for pin in result.report.pinned)
    if cuts == "always":
        for k, norm in enumerate(net.norms):
            assert len(narrow.get_parameter(f"norms.{k}.weight")) == len(norm.weight) // 2


@pytest.mark.parametrize("kind", ["linspace", "sized"])
def test_channels_that_meet_numbers_in_the_code(kind: str) -> None:
    """They are a vector of its own, of which as many are taken as there are channels left; not so
    where their number, and then the numbers themselves, depend on how many channels there are."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            with torch.no_grad():
                self.a.weight[:3], self.a.bias[:3] = 0, 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            steps = 8 if kind == "linspace" else x.size(1)
            scale = torch.linspace(0.1, 1, steps, device=x.device, dtype=x.dtype)
            y: Tensor = self.b(x * scale[:, None, None])
            return y

    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(4, 3, 6, 6).double()
    narrow = demp_fx.compile(net, x, cuts="always").module
    assert relative_error(narrow(x), net(x)) <= 1e-12
    assert narrow.get_parameter("a.weight").shape[0] == (5 if kind == "linspace" else 8)


def test_one_dim_is_gathered_and_another_filled_up_before_one_reader() -> None:
    """It hears some channels of one factor, and its bias makes something of zeros of the other."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rows, self.columns = nn.Linear(4, 6), nn.Linear(4, 5)
            self.mix, self.out, self.other = nn.Linear(5, 3), nn.Linear(18, 2), nn.Linear(30, 2)
            with torch.no_grad():
                for layer in (self.rows, self.columns):
                    layer.weight[:2] = layer.bias[:2] = 0
                self.mix.weight[:, 3] = 0
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            products = self.rows(x).unsqueeze(2) * self.columns(x).unsqueeze(1)
            return self.out(self.mix(products).flatten(1)) + self.other(products.flatten(1).tanh())

    net, x = Products(), torch.randn(3, 4).double()
    narrow = demp_fx.compile(net, x, cuts="always").module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("rows.weight").shape == (4, 4)
    assert narrow.get_parameter("mix.weight").shape == (3, 2)


@pytest.mark.parametrize("size", [(None, 1), (8, 1)])
def test_an_adaptive_pool_leaves_an_axis_as_it_is_that_keeps_its_size(size: Any) -> None:
    """As where text is read: of channels and rows the rows are averaged. (A size that the code
    itself gives in numbers stays.)"""

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.pool = nn.Conv2d(2, 8, 3), nn.AdaptiveAvgPool2d(size)
            self.out = nn.Linear(8, 3)
            with torch.no_grad():
                self.conv.weight[:5] = self.conv.bias[:5] = 0  # type: ignore[index]
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            columns = self.conv(x).relu().permute(0, 3, 1, 2)
            return self.out(self.pool(columns).squeeze(3))

    net, x = Columns(), torch.randn(3, 2, 7, 9).double()
    narrow = demp_fx.compile(net, x, cuts="always").module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("conv.weight").shape[0] == (3 if size[0] is None else 8)


def test_the_size_of_what_is_shuffled_is_that_of_what_is_left() -> None:
    """Halves are told by the size of a shuffled value, of which all are left in the first one."""

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            half = x.shape[1] // 2 + x.shape[1] % 2
            x = torch.cat([x[:, :half], self.norm(self.conv(x[:, half:])).relu()], 1)
            batch, channels, length = x.size()
            x = x.view(batch, 2, channels // 2, length).transpose(1, 2).contiguous()
            return x.view(batch, -1, length)

    torch.manual_seed(0)
    units = [Unit() for _ in range(2)]
    norm = nn.BatchNorm1d(12)
    net = nn.Sequential(nn.Conv1d(3, 12, 1), norm, *units, nn.Conv1d(12, 2, 1)).double().eval()
    with torch.no_grad():
        for layer, dead in ((norm, [3, 5]), (units[0].norm, [4, 5])):
            layer.weight[dead] = layer.bias[dead] = 0
    x = torch.randn(2, 3, 7).double()
    result = demp_fx.compile(net, x, cuts="always")
    assert relative_error(result.module(x), net(x)) <= 1e-12
    assert not any("another size" in pin.reason for pin in result.report.pinned)
    assert result.module.get_parameter("0.weight").size(0) == 10
    assert result.module.get_parameter("2.conv.weight").shape == (4, 6, 1)
    assert result.module.get_parameter("3.conv.weight").shape == (6, 2, 1)
