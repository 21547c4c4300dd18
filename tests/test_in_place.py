"""Values that are written in place through another name, and read again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import demp_fx
from demp_fx.channels.writes import Write, refined
from demp_fx.errors import TraceError
from demp_fx.tracing.augmented import IN_PLACE


class Rewritten(nn.Module):
    """A linear layer whose bias is a copy that `write` changes first."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.write = write
        self.weight = nn.Parameter(torch.randn(12, 5))
        self.bias = nn.Parameter(torch.randn(12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.clone()
        self.write(bias)
        hidden: Tensor = F.linear(x, self.weight, bias)
        result: Tensor = self.head(hidden.relu())
        return result


def _zero_the_middle(bias: Tensor) -> None:
    third = bias.numel() // 3
    bias[third : 2 * third].zero_()


def _fill_twice(bias: Tensor) -> None:
    bias.view(3, 4)[1].fill_(-1.0)
    bias[:2].fill_(0.0)


def _narrow(net: Rewritten, cuts: str = "always") -> tuple[nn.Module, Tensor]:
    net = net.double().eval()
    x = torch.randn(7, 5, dtype=torch.float64)
    return demp_fx.compile(net, (x,), cuts=cuts).module, x


@pytest.mark.parametrize("write", [_zero_the_middle, _fill_twice])
def test_a_row_is_dead_where_zero_was_written_into_its_bias(
    write: Callable[[Tensor], object],
) -> None:
    torch.manual_seed(0)
    net = Rewritten(write)
    with torch.no_grad():
        net.weight[:] = 0  # then each unit is its bias alone
    narrow, x = _narrow(net)
    assert narrow.get_submodule("head").weight.shape == (3, 1)
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


def test_what_was_written_over_is_no_longer_what_it_was() -> None:
    torch.manual_seed(1)
    net = Rewritten(lambda bias: bias[4:8].fill_(2.0))
    with torch.no_grad():
        net.weight[2:10] = 0
        net.bias[2:10] = 0  # dead, but for the four that are written
    narrow, x = _narrow(net)
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_submodule("head").weight.shape == (3, 4)


def test_rows_go_with_their_places_in_a_slice_that_is_written() -> None:
    torch.manual_seed(2)
    net = Rewritten(_zero_the_middle)
    with torch.no_grad():
        for start in (0, 4, 8):  # as many in each third
            net.head.weight[:, start + 1 : start + 3] = 0
    narrow, x = _narrow(net)
    assert narrow.weight.shape == (6, 5)
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


def test_a_write_that_is_not_one_number_keeps_everything() -> None:
    torch.manual_seed(3)
    net = Rewritten(lambda bias: bias[4:8].add_(bias[:4]))
    with torch.no_grad():
        net.weight[2:10] = 0
        net.bias[2:10] = 0
    narrow, x = _narrow(net)
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


def test_a_buffer_without_channels_that_is_written_over() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            gate = torch.zeros(1)
            gate[0:].fill_(3.0)
            result: Tensor = self.b(self.a(x) * gate)
            return result

    torch.manual_seed(4)
    net = Gate().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,)).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


class Shifted(nn.Module):
    """Values of the step before, written into rows of a tensor of zeros; three channels are zero.

    `read`: whether a layer reads them, or they are what the network gives.
    """

    def __init__(self, read: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2) if read else nn.Identity()
        self.double()
        with torch.no_grad():
            self.a.weight[[0, 3, 4]], self.a.bias[[0, 3, 4]] = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        before = torch.zeros_like(hidden)
        before[:, 1:] = hidden[:, :-1].relu()
        before[:, 0].add_(hidden[:, -1])
        result: Tensor = self.b(before)
        return result


@pytest.mark.parametrize(("read", "width"), [(True, 5), (False, 8)])
def test_channels_that_are_written_into_themselves_may_go(read: bool, width: int) -> None:
    net, x = Shifted(read), torch.randn(3, 5, 4, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,), cuts="always").module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("a.weight").shape[0] == width


class PartsShifted(nn.Module):
    """A quarter of the channels is that of the next step, a quarter that of the one before, written
    into zeros; how many that is, is worked out of a size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.double()
        with torch.no_grad():
            for layer in (self.a, self.b):  # in each part at least one
                layer.bias.zero_()
            self.a.weight[[0, 3, 4, 5]] = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        fold = hidden.shape[-1] // 4
        shifted = torch.zeros_like(hidden)
        shifted[:, :-1, :fold] = hidden[:, 1:, :fold]
        shifted[:, 1:, fold : 2 * fold] = hidden[:, :-1, fold : 2 * fold]
        shifted[:, :, 2 * fold :] = hidden[:, :, 2 * fold :]
        result: Tensor = self.b(shifted)
        return result


@pytest.mark.parametrize("batch", [1, 3])
def test_parts_of_channels_may_be_written_into_themselves(batch: int) -> None:
    net, x = PartsShifted(), torch.randn(batch, 5, 4, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,)).module
    longer = torch.randn(2, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(narrow(longer), net(longer), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("a.weight").shape == (4, 4)
    assert narrow.get_parameter("b.weight").shape == (3, 4)


def test_a_part_that_is_written_into_another_one_is_tied_to_it() -> None:
    class Crossed(PartsShifted):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            crossed = torch.zeros_like(hidden)
            crossed[..., :4] = hidden[..., 4:]
            crossed[..., 4:] = hidden[..., :4] + 1
            result: Tensor = self.b(crossed)
            return result

    net, x = Crossed(), torch.randn(3, 5, 4, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,)).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


class Caches(nn.Module):
    """Attention over keys that are kept in a cache, which is a buffer or a mere attribute.

    `moves`: whether the cache is assigned anew, as code does that takes it to another device.
    """

    def __init__(self, buffer: bool, moves: bool) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.moves = moves
        self.query, self.key, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.cache: Tensor
        if buffer:
            self.register_buffer("cache", torch.zeros(9, 16, 2, 4))
        else:
            self.cache = torch.zeros(9, 16, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        query, key = (layer(x).view(batch, steps, 2, 4) for layer in (self.query, self.key))
        if self.moves:
            self.cache = self.cache.to(key)
        self.cache[:batch, :steps] = key
        keys = self.cache[:batch, :steps]
        mixed = (query @ keys.transpose(-1, -2)).softmax(-1) @ keys
        result: Tensor = self.head(mixed.reshape(batch, steps, 8))
        return result


@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("moves", [True, False])
def test_what_a_cache_held_before_says_nothing(buffer: bool, moves: bool) -> None:
    net, x = Caches(buffer, moves), torch.randn(2, 5, 6)
    narrow = demp_fx.compile(net, (x,)).module
    assert not net.cache.any()  # nobody's numbers are left in it
    with torch.no_grad():
        for other in (x, torch.randn(3, 4, 6)):
            torch.testing.assert_close(narrow(other), net(other))


def test_a_part_that_is_taken_before_has_what_is_added_later() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            with torch.no_grad():
                self.a.weight[:3], self.a.bias[:3] = 0, 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            rest = x[:, 1:].transpose(0, 1)
            x += x.sigmoid()
            result: Tensor = self.b(rest)
            return result

    torch.manual_seed(7)
    net, x = Taken().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,)).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", ["never", "pays", "always"])
def test_a_shortcut_reads_what_a_relu_has_left(cuts: str) -> None:
    """It picks its channels behind the branch that begins with the ReLU, not before it."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)
            self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3))
            self.shortcut = nn.Linear(8, 3)
            with torch.no_grad():
                self.a.weight[:4], self.a.bias[:4], self.b.weight[:3], self.b.bias[:3] = 0, -1, 0, 0
                self.shortcut.weight[:, 4:6] = 0

        def forward(self, x: Tensor) -> Tensor:
            total = self.a(x) + self.b(x)
            result: Tensor = self.branch(total) + self.shortcut(total)
            return result

    torch.manual_seed(7)
    net, x = Branches().double(), torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        narrow = demp_fx.compile(net, (x,), cuts=cuts).module
        torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


class Joined(nn.Module):
    """Two branches of twelve channels, each read by a head of its own, and `join` of both, which is
    written into and read twice: each reader takes other channels of it."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.join = join
        self.a, self.b = nn.Linear(5, 12), nn.Linear(5, 12)
        self.heads = nn.ModuleList(nn.Linear(n, 3) for n in (12, 12, width, width))
        self.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        a, b = self.a(x), self.b(x)
        y = self.join(a, b)
        return [head(value) for head, value in zip(self.heads, (a, b, y, y), strict=True)]


def _add_all_but_the_first(a: Tensor, b: Tensor) -> Tensor:
    y = a + 1.0
    y[:, 1:] += b[:, 1:]
    return y


def _cat_and_rectify_all_but_the_first(a: Tensor, b: Tensor) -> Tensor:
    y = torch.cat([a, b], dim=-1)
    y[:, 1:].relu_()
    return y


@pytest.mark.parametrize(
    ("join", "width"), [(_add_all_but_the_first, 12), (_cat_and_rectify_all_but_the_first, 24)]
)
def test_what_is_gathered_after_a_write_has_it(
    join: Callable[[Tensor, Tensor], Tensor], width: int
) -> None:
    net, x = Joined(join, width), torch.randn(2, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        net.heads[2].weight[:, [0, 1, 5, width - 4, width - 1]] = 0
        net.heads[3].weight[:, [2, 3, 5, width - 4, width - 2]] = 0
    narrow = demp_fx.compile(net, (x,), cuts="always").module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    for head in ("heads.2", "heads.3"):
        assert narrow.get_parameter(f"{head}.weight").shape == (3, width - 5)


def _assign(layer: nn.Conv2d) -> None:
    layer.weight.data = layer.weight.data * layer.mask


def _assign_in_place(layer: nn.Conv2d) -> None:
    layer.weight.data *= layer.mask


def _multiply(layer: nn.Conv2d) -> None:
    layer.weight.data.mul_(layer.mask)


class Masked(nn.Conv2d):
    """A convolution that sees nothing of what comes after a pixel, as in a PixelCNN."""

    mask: Tensor

    def __init__(self, change: Callable[[nn.Conv2d], None], channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.change = change
        mask = torch.ones_like(self.weight)
        mask[:, :, 1, 2:], mask[:, :, 2:] = 0, 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return super().forward(x)


@pytest.mark.parametrize("change", [_assign, _assign_in_place, _multiply])
def test_a_weight_that_is_masked_in_place_is_narrowed(change: Callable[[nn.Conv2d], None]) -> None:
    torch.manual_seed(8)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Masked(change, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        for layer in (net[0], net[1]):
            layer.weight[:4], layer.bias[:4] = 0, 0
    weight = net[1].weight.detach().clone()
    x = torch.randn(2, 3, 6, 6)
    narrow = demp_fx.compile(net, x).module
    torch.testing.assert_close(net[1].weight, weight, rtol=0, atol=0)  # the model is as it was
    assert narrow.get_parameter("1.weight").size(1) == 4
    torch.testing.assert_close(narrow(x), net(x))


def test_rows_of_a_weight_that_is_written_over_are_those_of_what_is_written() -> None:
    class Fused(nn.Module):
        """A layer that gets the product of two others as its weight, each time."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fused = (nn.Linear(6, 6, bias=False) for _ in range(3))
            with torch.no_grad():
                self.fused.weight[:3], self.b.weight[4:] = 0, 0

        def forward(self, x: Tensor) -> Tensor:
            self.fused.weight.data = self.b.weight.data @ self.a.weight.data
            result: Tensor = self.fused(x)
            return result

    torch.manual_seed(9)
    net, x = nn.Sequential(Fused(), nn.Linear(6, 2)).double(), torch.randn(5, 6).double()
    narrow = demp_fx.compile(net, x).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


def test_data_of_another_form_is_in_no_graph() -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = torch.cat([self.weight.data, x[:1]])
            return x @ self.weight.mT

    with pytest.raises(TraceError, match="the data of a tensor is exchanged"):
        demp_fx.trace(Grown(), torch.randn(3, 4))


def test_a_forward_that_writes_into_its_input_is_compared_on_copies() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x *= 255.0
            result: Tensor = self.layer(x)
            return result

    net, x = Scaled().double(), torch.randn(3, 4, dtype=torch.float64)
    before = x.clone()
    narrow = demp_fx.compile(net, x).module
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    torch.testing.assert_close(narrow(x.clone()), net(x.clone()))


class Reshaped(nn.Module):
    """A value that is given another shape, under the name that it has; then code that may not be
    looked into, as it asks for a number."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        same = x
        x.unsqueeze_(1).transpose_(1, -1)  # (batch, 8, tokens, 1)
        result = same.relu().squeeze_(-1)
        if self.asks and float(result.detach().sum()) < -1:
            return x
        return result.mT


@pytest.mark.parametrize("asks", [False, True])
def test_a_value_whose_shape_is_changed_in_place_has_it_under_each_name(asks: bool) -> None:
    torch.manual_seed(0)
    embed, head = nn.Linear(6, 8), nn.Linear(8, 3)
    with torch.no_grad():
        embed.weight[:3], embed.bias[:3] = 0, 0
    net = nn.Sequential(embed, Reshaped(asks), head).double()
    x = torch.randn(2, 5, 6).double()
    result = demp_fx.compile(net, x)
    assert list(result.report.opaque) == (["1"] if asks else [])
    assert result.module.get_parameter("0.weight").shape == (8 if asks else 5, 6)
    torch.testing.assert_close(result.module(x), net(x), rtol=1e-12, atol=1e-12)


class Cached(nn.Module):
    """Attention to keys and values that a buffer holds, into which each call writes its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.register_buffer("keys", torch.zeros(2, 3, 9, 4))
        self.register_buffer("values", torch.zeros(2, 3, 9, 4))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        heads = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k, v = heads
        self.keys[:, :, places], self.values[:, :, places] = k, v
        k, v = self.keys[:, :, : x.shape[1]], self.values[:, :, : x.shape[1]]
        mixed = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.o(mixed.transpose(1, 2).flatten(-2))
        return result


@pytest.mark.parametrize("alike", [False, True])
def test_what_is_written_into_a_cache_is_as_wide_as_the_cache(alike: bool) -> None:
    torch.manual_seed(0)
    net, x, places = Cached().double(), torch.randn(2, 5, 12).double(), torch.arange(5)
    dead = [0, 4, 8] if alike else [0, 5, 10]  # at one place in each head, or not
    with torch.no_grad():
        for layer in (net.q, net.k, net.v):
            layer.weight[dead], layer.bias[dead] = 0, 0
    narrow = demp_fx.compile(net, (x, places), cuts="always").module
    assert narrow.get_parameter("k.weight").shape == (9, 12)
    for _ in range(2):
        x = torch.randn_like(x)
        expected = net(x, places)
        torch.testing.assert_close(narrow(x, places), expected, rtol=1e-12, atol=1e-12)


def _a_part(x: Tensor) -> Tensor:
    row = x[:, 0]
    row *= 2
    row -= 1
    return x


def _another_name(x: Tensor) -> Tensor:
    same = x
    same += 1
    return x


def _a_view_of_a_view(x: Tensor) -> Tensor:
    flat = x.transpose(1, 2)[0]
    flat /= 3
    return x


def _by_a_function(x: Tensor) -> Tensor:
    row = torch.select(x, 1, 0)
    row -= 1
    return x


def _turned(x: Tensor) -> Tensor:
    turned = x.mT
    turned *= 2
    return x


def _nobody_else(x: Tensor) -> Tensor:
    y = x.relu()
    y += x
    return y


def _sizes(x: Tensor) -> Tensor:
    n = x.shape[1]
    n += 1
    return x * (n - x.shape[1])


AUGMENTED = (_a_part, _another_name, _a_view_of_a_view, _by_a_function, _turned,
             _nobody_else, _sizes)  # fmt: skip


@pytest.mark.parametrize("assign", AUGMENTED)
def test_augmented_assignment_is_seen_under_each_name(assign: Callable[[Tensor], Tensor]) -> None:
    class Middle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return assign(x)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(6, 8, 1), Middle(), nn.Conv1d(8, 3, 1)).double()
    with torch.no_grad():
        net[0].weight[:3], net[0].bias[:3] = 0, 0  # type: ignore[index]
    x = torch.randn(2, 6, 5).double()
    graph = demp_fx.trace(net, x)
    in_place = any(node.target in IN_PLACE.values() for node in graph.graph.nodes)
    assert in_place == (assign not in (_nobody_else, _sizes))
    torch.testing.assert_close(graph(x), net(x), rtol=1e-12, atol=1e-12)
    narrow = demp_fx.compile(net, x).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert all(type(module.training) is bool for module in net.modules())


class Sliced(Cached):
    """The same with the positions outside of the heads: parts of the buffers are written and read,
    and what is read of them stands in the buffers as in the layers."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.keys, self.values = (torch.full((2, 9, 3, 4), start) for _ in range(2))

    def forward(self, x: Tensor, first: int) -> Tensor:
        last = first + x.shape[1]
        q, k, v = (f(x).unflatten(-1, (3, 4)) for f in (self.q, self.k, self.v))
        self.keys[:, first:last], self.values[:, first:last] = k, v
        k, v = self.keys[:, :last], self.values[:, :last]
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        result: Tensor = self.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))
        return result


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("alike", [False, True])
def test_a_cache_is_narrowed_with_what_is_written_into_parts_of_it(
    alike: bool, start: float
) -> None:
    torch.manual_seed(0)
    net, x = Sliced(start).double(), torch.randn(2, 5, 12).double()
    dead = [0, 4, 8] if alike else [0, 5, 10]
    with torch.no_grad():
        for layer in (net.q, net.k, net.v):
            layer.weight[dead], layer.bias[dead] = 0, 0
    narrow = demp_fx.compile(net, (x, 2), cuts="always").module
    known = start == 0  # else the first positions hold other numbers than zeros
    assert narrow.get_parameter("v.weight").shape == (9, 12)
    assert narrow.get_parameter("o.weight").shape == (12, 9 if known else 12)
    assert narrow.get_buffer("keys").shape == (2, 9, 3, 3 if alike else 4)
    assert narrow.get_buffer("values").shape == (2, 9, 3, 3 if alike and known else 4)
    for _ in range(3):
        x = torch.randn_like(x)
        torch.testing.assert_close(narrow(x, 2), net(x, 2), rtol=1e-12, atol=1e-12)


def test_a_cache_that_is_written_the_other_way_round_is_no_less_exact() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 3)
            self.register_buffer("state", torch.zeros(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.state.mT.copy_(self.a(x).unflatten(-1, (4, 4)))
            result: Tensor = self.b(self.state.flatten(1))
            return result

    torch.manual_seed(0)
    net, x = Turned().double(), torch.randn(2, 5).double()
    with torch.no_grad():
        net.a.weight[[0, 4, 8, 12]], net.a.bias[[0, 4, 8, 12]] = 0, 0
    narrow = demp_fx.compile(net, (x,), cuts="always").module
    for _ in range(2):
        x = torch.randn_like(x)
        torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


def test_what_is_written_the_other_way_round_has_its_channels_elsewhere() -> None:
    heads, inner = torch.arange(1, 5), torch.arange(5, 9)
    own = heads.reshape(1, 4, 1), inner.reshape(1, 1, 4)
    turned = inner.reshape(1, 4, 1), heads.reshape(1, 1, 4)
    finer, origin = torch.arange(9, 25).reshape(1, 4, 4), torch.arange(25)
    writes = [Write(torch.empty(2, 4, 4), None, finer=finer, coarse=x) for x in (own, turned)]
    assert refined(own, writes[:1], origin) is finer
    assert refined(own, writes[1:], origin) is None
