"""Shortcuts without parameters: channels that are padded on are channels that may go, too."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.cuts import Cuts
from demp_fx.errors import VerificationError
from demp_fx.passes import verify
from tests.zoo.kill import relative_error

ALIKE = ([], [], [0, 1, 14, 15])  # what is dead behind the stem, in the branch and on the stream
SOME = ([0, 1, 2], [1, 3, 5, 7], [0, 1, 4, 5, 6, 12, 13])
ALL = ([0, 1], [2], list(range(16)))


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], 16 - x.shape[1], x.shape[2], x.shape[3], dtype=x.dtype)


SHORTCUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "pad": lambda x: F.pad(x, (0, 0, 0, 0, 4, 4)),
    "pad_by_name": lambda x: F.pad(x, pad=[0, 0, 0, 0, 0, 8], mode="constant", value=0),
    "pad_in_space": lambda x: F.pad(x, (1, 0, 0, 1, 4, 4))[:, :, 1:, :-1],
    "pad_up_to": lambda x: F.pad(x, (0, 0, 0, 0, 0, 16 - x.shape[1])),
    "pad_ones": lambda x: F.pad(x, (0, 0, 0, 0, 4, 4), value=1.0),
    "cat_zeros": lambda x: torch.cat([x, zeros(x)], 1),
    "cat_new_zeros": lambda x: torch.cat((x, x.new_zeros(len(x), 8, x.size(2), x.size(3))), 1),
}


class Residual(nn.Module):
    """Downsampling as in the first residual networks for CIFAR."""

    def __init__(self, shortcut: Callable[[Tensor], Tensor], dead: tuple[list[int], ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.norm_a = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.b, self.norm_b = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.next, self.head, self.shortcut = nn.Conv2d(16, 16, 1), nn.Linear(16, 5), shortcut
        with torch.no_grad():
            for norm, channels in zip((self.norm, self.norm_a, self.norm_b), dead, strict=True):
                norm.weight.uniform_(0.2, 1)
                norm.weight[channels] = 0
                norm.bias[channels] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        branch = self.norm_b(self.b(self.norm_a(self.a(x)).relu()))
        x = (branch + self.shortcut(F.avg_pool2d(x, 2))).relu()
        logits: Tensor = self.head(self.next(x).mean((2, 3)))
        return logits


@pytest.mark.parametrize("cuts", ["never", "pays", "always"])
@pytest.mark.parametrize("dead", [ALIKE, SOME, ALL])
@pytest.mark.parametrize("name", SHORTCUTS)
def test_the_function_is_kept(name: str, dead: tuple[list[int], ...], cuts: Cuts) -> None:
    model = Residual(SHORTCUTS[name], dead)
    result = demp_fx.compile(model, torch.randn(2, 3, 8, 8).double(), cuts=cuts)
    assert result.report.verification is not None
    assert result.report.verification.eval_error < 1e-12
    x = torch.randn(3, 3, 12, 12).double()
    torch.testing.assert_close(result.module.eval()(x), model.eval()(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["pad", "pad_in_space"])
def test_what_is_padded_on_goes_with_the_stream(name: str) -> None:
    """Four channels are padded on at each end: of those, two are dead in the branch as well."""
    model = Residual(SHORTCUTS[name], ALIKE)
    narrow = demp_fx.compile(model, torch.randn(2, 3, 8, 8).double(), cuts="never").module
    assert narrow.get_parameter("norm_b.weight").shape == (12,)
    assert narrow.get_parameter("next.weight").shape[1] == 12


@pytest.mark.parametrize("name", ["cat_zeros", "cat_new_zeros", "pad_up_to"])
def test_so_it_does_behind_it(name: str) -> None:
    model = Residual(SHORTCUTS[name], ALIKE)
    narrow = demp_fx.compile(model, torch.randn(2, 3, 8, 8).double(), cuts="never").module
    assert narrow.get_parameter("norm_b.weight").shape == (14,)


def test_ones_that_are_padded_on_are_folded() -> None:
    model = Residual(SHORTCUTS["pad_ones"], ALL)
    narrow = demp_fx.compile(model, torch.randn(2, 3, 8, 8).double(), cuts="never").module
    assert narrow.get_parameter("next.weight").shape[1] < 9


def even(size: int) -> int:
    """How much is missing to windows of three, two apart, as "same" padding has it."""
    return max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)


LOW = -math.inf
MARGINS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "same": (lambda x: F.max_pool2d(F.pad(x, (0, even(x.size(3)), 0, even(x.size(2))), value=LOW),
                                    3, 2), True),
    "both_ends": (lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-1e4), 3), True),
    "of_zeros": (lambda x: F.max_pool2d(F.pad(x.relu(), (1, 0, 0, 0)), (3, 2)), True),
    "the_pool_pads_too": (lambda x: F.max_pool2d(F.pad(x, (1,) * 4, value=LOW), 3, padding=1),
                          True),
    "not_so_low": (lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=0.7), 3), False),
    "all_margin": (lambda x: F.max_pool2d(F.pad(x, (3, 0, 0, 0), value=-5.0), 3), False),
    "all_margin_together": (lambda x: F.max_pool2d(F.pad(x, (2,) * 4, value=-5.0), 3, padding=1),
                            False),
    "all_margin_at_another_size": (lambda x: F.max_pool2d(
        F.pad(x, (x.size(3) - 7, 0, 0, 0), value=-5.0), 2), False),
    "larger_than_the_rest": (lambda x: F.max_pool2d(
        F.pad(x, (1, 1, 1, 1), value=-5.0), 2, dilation=2), False),
    "samples": (lambda x: F.max_pool2d(F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1), value=-5.0), 2), False),
    "summed": (lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=-5.0), 3), False),
}  # fmt: skip


@pytest.mark.parametrize("name", MARGINS)
def test_windows_that_reach_beyond_a_margin(name: str) -> None:
    """The largest of a window is what is known of a channel if the margin is below it, and no
    window all margin."""
    pool, known = MARGINS[name]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.head = nn.Conv2d(8, 4, 1)
            with torch.no_grad():
                self.norm.weight[:4] = 0
                self.norm.bias[:4] = torch.tensor([0.0, 0.0, 0.5, 0.5])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(pool(self.norm(self.stem(x))))
            return out

    torch.manual_seed(0)
    net = Net().double().eval()
    narrow = demp_fx.compile(net, torch.randn(2, 3, 8, 8).double()).module
    for side in (8, 9, 11):
        x = torch.randn(2, 3, side, side).double()
        torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("head.weight").shape[1] == (4 if known else 8)


@pytest.mark.parametrize("ends", [(0, 1), (1, 0), (2, 1)])
def test_what_is_padded_on_in_each_head(ends: tuple[int, int]) -> None:
    """A one behind the values of a head, which sums up its shares."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(5, 3 * 12), nn.Linear(12, 2)
            with torch.no_grad():
                for part, dead in enumerate(([0, 4, 9], [0, 4, 9], [1, 5, 6, 10, 11, 2])):
                    for channel in dead:
                        self.qkv.weight[12 * part + channel] = 0
                        self.qkv.bias[12 * part + channel] = 0
                self.out.weight[:, [1, 2, 5, 6, 10, 11]] = 0

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
            )
            kv = k.relu().transpose(-1, -2) @ F.pad(v, ends, value=1.0)
            mixed = q.relu() @ kv
            first = ends[0]
            total = mixed[..., -1:] if ends[1] else mixed[..., :1]
            mixed = mixed[..., first : first + v.size(-1)] / (total + 0.5)
            result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
            return result

    torch.manual_seed(0)
    net = Linear().double()
    narrow = demp_fx.compile(net, torch.randn(2, 6, 5).double(), cuts="always").module
    x = torch.randn(3, 8, 5).double()
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("qkv.weight").shape == (3 * 3 + 3 * 3 + 3 * 2, 5)
    assert narrow.get_parameter("out.weight").shape == (2, 6)


def missing(x: Tensor) -> int:
    """How many columns there are too few for windows of 4."""
    return -x.shape[3] % 4


def written(x: Tensor) -> Tensor:
    whole = x.new_zeros(len(x), x.shape[1], x.shape[2], x.shape[3] + missing(x))
    whole[:, :, :, : x.shape[3]] = x
    return whole


UP_TO_WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "pad": lambda x: F.pad(x, (0, missing(x))),
    "written": written,
    "pooled": lambda x: F.avg_pool2d(x, 3, 1, padding=(0, x.shape[3] % 2)),
    "depthwise": lambda x: F.conv2d(x, x.new_ones(8, 1, 1, 3), padding=(0, missing(x)), groups=8),
}


class Windows(nn.Module):
    """Half of the channels are constants, which the zeros padded on are not."""

    def __init__(self, pad: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)
        self.pad = pad
        with torch.no_grad():
            self.norm.weight[:4], self.norm.bias[:4] = 0, 0.7
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.pad(self.norm(self.a(x)))).relu()
        return result


@pytest.mark.parametrize("way", list(UP_TO_WINDOWS))
def test_constants_are_none_where_another_input_is_padded(way: str) -> None:
    model = Windows(UP_TO_WINDOWS[way])
    narrow = demp_fx.compile(model, torch.randn(2, 3, 8, 8, dtype=torch.float64)).module
    for width in (8, 9, 11):  # the first one needs no padding
        x = torch.randn(2, 3, 8, width, dtype=torch.float64)
        torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-12)


def test_a_convolution_whose_padding_depends_on_the_input_folds_no_constants() -> None:
    class Same(Windows):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.a(x))
            return F.conv2d(h, self.b.weight, self.b.bias, padding=(0, x.shape[3] % 2))

    model = Same(torch.relu)
    narrow = demp_fx.compile(model, torch.randn(2, 3, 8, 8, dtype=torch.float64)).module
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-12)


class Frames(nn.Module):
    """Keeps its stride and kernel in tensors, and pads up to whole frames."""

    def __init__(self, wide: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(wide, channels, kernel, stride)
        self.stride = nn.Buffer(torch.tensor(stride), persistent=False)
        self.kernel = nn.Buffer(torch.tensor(kernel), persistent=False)
        self.before = nn.Buffer(self.kernel - self.stride, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        frames = torch.ceil((length - self.kernel + self.before) / self.stride + 1).long() - 1
        behind = frames * self.stride + self.kernel - self.before - length
        y: Tensor = self.conv(F.pad(x, (self.before, behind)))
        return y


@pytest.mark.parametrize("constant", [0.0, 0.7])
def test_what_is_padded_may_be_worked_out_of_numbers_in_buffers(constant: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Frames(2, 8, 7, 1), nn.ReLU(), Frames(8, 6, 4, 4)).double().eval()
    with torch.no_grad():
        model[0].conv.weight[:5], model[0].conv.bias[:5] = 0, constant
    narrow = demp_fx.compile(model, torch.randn(2, 2, 16, dtype=torch.float64)).module
    for length in (16, 17, 32):  # the first one is whole frames
        x = torch.randn(3, 2, length, dtype=torch.float64)
        torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-12)
    assert narrow.get_submodule("2.conv").in_channels == (8 if constant else 3)


def test_places_may_be_counted_by_a_number_in_a_tensor_of_sizes() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            sizes = torch.tensor([(x.shape[1], x.shape[2])], device=x.device)
            height = sizes[0, 0]
            rows = torch.arange(0, height, dtype=x.dtype, device=x.device) / height
            result: Tensor = self.read(self.make(x).relu() * rows.view(1, -1, 1, 1))
            return result

    torch.manual_seed(0)
    model = Rows().double()
    with torch.no_grad():
        model.make.weight[:5] = model.make.bias[:5] = 0
    narrow = demp_fx.compile(model, torch.randn(2, 5, 6, 4, dtype=torch.float64)).module
    assert narrow.get_parameter("make.weight").shape == (3, 4)
    x = torch.randn(3, 7, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-12)


def test_images_are_compared_that_no_window_divides() -> None:
    model = Windows(UP_TO_WINDOWS["pad"])
    wrong = Windows(lambda x: F.pad(x, (0, missing(x)), value=1.0))
    with pytest.raises(VerificationError, match=r"13, 13"):
        verify(model, wrong, torch.randn(2, 3, 8, 8, dtype=torch.float64))


def test_maps_that_only_happen_to_fit_are_no_reason_to_refuse() -> None:
    """A map of one place is spread over one of four, at a size that nobody trains at."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer = nn.Conv2d(3, 8, 32, stride=32), nn.Conv2d(3, 8, 1)
            self.head = nn.Conv2d(8, 2, 1)
            self.double().eval()

        def forward(self, x: Tensor) -> Tensor:
            pooled = F.avg_pool2d(self.outer(x), 32, ceil_mode=True)
            return self.head((self.inner(x) + pooled).relu())

    model = Halves()
    with torch.no_grad():
        model.inner.weight[:4] = model.inner.bias[:4] = 0
        model.outer.weight[4:6] = model.outer.bias[4:6] = 0
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    result = demp_fx.compile(model, x, cuts="always")
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-12, atol=1e-12)
    assert any("other sizes" in warning for warning in result.report.warnings)


JOINED_ON: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: torch.cat([torch.zeros(x.shape[0], x.shape[1], 2, dtype=x.dtype), x], 2),
    "new_zeros": lambda x: torch.cat([x.new_zeros(len(x), x.size(1), 2), x], -1),
    "ones_like": lambda x: torch.cat([torch.ones_like(x[:, :, :2]), x], 2),
    "stack": lambda x: torch.stack([x, torch.zeros(x.shape, dtype=x.dtype)], 3).flatten(2),
}


@pytest.mark.parametrize("name", JOINED_ON)
def test_margins_that_are_joined_on_have_the_channels_of_what_they_are_joined_with(
    name: str,
) -> None:
    """Time steps of zeros in front of a causal convolution, say."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
            self.conv, self.head = nn.Conv1d(8, 8, 3), nn.Conv1d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(JOINED_ON[name](self.norm(self.stem(x)).relu()))
            result: Tensor = self.head(x.relu())
            return result

    torch.manual_seed(0)
    model = Causal().double().eval()
    with torch.no_grad():
        model.norm.weight[:4] = model.norm.bias[:4] = 0
        model.conv.weight[4:] = model.conv.bias[4:] = 0
    x = torch.randn(2, 3, 9).double()
    narrow = demp_fx.compile(model, x[:1], cuts="always").module
    assert relative_error(narrow(x), model(x)) <= 1e-12
    assert relative_error(narrow.train()(x), model.train()(x)) <= 1e-12
    if name != "ones_like":  # of which the convolution reads all
        assert narrow.get_parameter("stem.weight").size(0) == 4
        assert narrow.get_parameter("conv.weight").shape == (4, 4, 3)


AROUND: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: nn.Sequential(nn.CircularPad1d((2, 1)), nn.Conv1d(8, 8, 4)),
    "mode": lambda: nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
    "one_end": lambda: nn.Sequential(nn.CircularPad1d((2, 0)), nn.Conv1d(8, 8, 3)),
}


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("name", AROUND)
def test_what_is_padded_from_the_other_end_is_known_as_that_is(name: str, shift: float) -> None:
    torch.manual_seed(0)
    stem, norm, conv, head = (
        nn.Conv1d(3, 8, 1),
        nn.BatchNorm1d(8),
        AROUND[name](),
        nn.Conv1d(8, 2, 1),
    )
    net = nn.Sequential(stem, norm, conv, nn.ReLU(), head).double().eval()
    filters = next(m for m in conv.modules() if isinstance(m, nn.Conv1d))
    with torch.no_grad():
        norm.weight[:4], norm.bias[:4] = 0, shift
        filters.weight[4:] = filters.bias[4:] = 0  # type: ignore[index]
    x = torch.randn(2, 3, 9).double()
    narrow = demp_fx.compile(net, x[:1], cuts="always").module
    assert relative_error(narrow(x), net(x)) <= 1e-12
    assert relative_error(narrow.train()(x), net.train()(x)) <= 1e-12
    assert narrow.get_parameter("0.weight").size(0) == 4
    assert narrow.get_parameter("4.weight").size(1) == 4
