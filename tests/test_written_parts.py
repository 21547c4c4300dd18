"""Values that are written into parts of zeros, as spectral layers and cost volumes do it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import demp_fx

CHANNELS = 8


class Written(nn.Module):
    """Two layers, each with half of its channels dead, whose results `write` puts into zeros."""

    def __init__(self, write: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write = write
        self.a, self.b = nn.Conv1d(3, CHANNELS, 1), nn.Conv1d(3, CHANNELS, 1)
        self.head = nn.Conv1d(width, 2, 3, padding=1)
        with torch.no_grad():
            for layer, dead in ((self.a, [0, 1, 4, 6]), (self.b, [1, 2, 3, 6])):
                layer.weight[dead], layer.bias[dead] = 0, 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.write(self.a(x), self.b(x)))
        return result


def _positions(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.size(0), CHANNELS, a.size(2), dtype=a.dtype)
    out[:, :, :3] = a[:, :, :3]
    out[..., -2:] = b[..., -2:]
    return out


def _volume(a: Tensor, b: Tensor) -> Tensor:
    """The features of two views beside each other, one of them shifted."""
    batch, channels, width = a.shape
    out = a.new_zeros(batch, 2 * channels, 2, width)
    for shift in range(2):
        out[:, :channels, shift, shift:] = a[:, :, shift:]
        out[:, channels:, shift, shift:] = b[:, :, : width - shift]
    return out.sum(2)


def _steps(a: Tensor, b: Tensor) -> Tensor:
    """The states of two steps in one tensor, of which parts are taken first."""
    states = torch.zeros(2, a.size(0), CHANNELS, a.size(2), dtype=a.dtype)
    first, second = states[0], states[1]
    first.copy_(a)
    return (second + b) * states[0].sigmoid()


def _sums(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.size(0), CHANNELS, a.size(2), dtype=a.dtype)
    part = out[:, :, 1:]
    out += a
    out[:, : CHANNELS // 2] += b[:, : CHANNELS // 2]
    return torch.cat([out[:, :, :1], part.relu()], 2)


def _shifted(a: Tensor, b: Tensor) -> Tensor:
    """Fractions of the channels are shifted, each in a direction, as their number tells."""
    channels = b.size(1)
    fold = channels // 4
    out = torch.zeros_like(a)
    out[:, :fold, :-1] = a[:, :fold, 1:]
    out[:, fold : 2 * fold, 1:] = a[:, fold : 2 * fold, :-1]
    out[:, 2 * fold :] = a[:, 2 * fold :]
    out[:, channels // 2 :, : a.size(2) - 1] += b[:, channels // 2 :, 1:]
    return out


@pytest.mark.parametrize(
    ("write", "width", "left"),
    [
        (_positions, CHANNELS, 6),  # what is dead in both
        (_volume, 2 * CHANNELS, 8),  # what is dead in each
        (_steps, CHANNELS, 6),  # what is dead in both
        (_shifted, CHANNELS, 5),  # likewise
        (_sums, CHANNELS, 5),  # what is dead in both, or in the one that the second half has
    ],
)
def test_zeros_have_the_channels_that_are_written_into_parts_of_them(
    write: Callable[[Tensor, Tensor], Tensor], width: int, left: int
) -> None:
    net = Written(write, width)
    narrow = demp_fx.compile(net, torch.randn(3, 3, 7).double(), cuts="always").module
    for x in (torch.randn(2, 3, 7).double(), torch.randn(1, 3, 9).double()):
        torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("head.weight").size(1) == left


def test_modes_of_a_fourier_layer() -> None:
    """Weights for some frequencies alone: these stay, and the channels go on both sides."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6, 3, 2, 2))
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(6, 2, 1)
            with torch.no_grad():
                self.stem.weight[::2], self.stem.bias[::2], self.head.weight[:, :3] = 0, 0, 0

        def forward(self, x: Tensor) -> Tensor:
            modes = torch.fft.rfft2(self.stem(x))
            weight = torch.view_as_complex(self.weight)
            out = torch.zeros(x.size(0), 6, *modes.shape[2:], dtype=modes.dtype)
            for rows in (slice(0, 3), slice(-3, None)):
                part = modes[:, :, rows, :2]
                out[:, :, rows, :2] = torch.einsum("bixy,ioxy->boxy", part, weight)
            result: Tensor = self.head(torch.fft.irfft2(out, s=x.shape[2:]))
            return result

    torch.manual_seed(1)
    net = Spectral().double()
    narrow = demp_fx.compile(net, torch.randn(2, 3, 8, 8).double()).module
    for x in (torch.randn(1, 3, 8, 8).double(), torch.randn(2, 3, 9, 12).double()):
        torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("weight").shape == (4, 3, 3, 2, 2)


def test_zeros_of_the_code_that_channels_are_added_into() -> None:
    """Which go where is in a buffer: a count sketch."""

    class Sketch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.randint(0, 6, (8,)))
            self.a, self.head = nn.Linear(3, 8), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros(x.size(0), 6, dtype=x.dtype)
            result: Tensor = self.head(out.index_add_(1, self.places, self.a(x)).relu())
            return result

    torch.manual_seed(2)
    net, x = Sketch().double(), torch.randn(4, 3).double()
    narrow = demp_fx.compile(net, x).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
