"""Complex numbers: channels go through them; the two parts of a number go together, or stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import demp_fx

DEAD = [0, 1, 4, 5, 6]  # of 8: two whole pairs of neighbours, and half of one


class Network(nn.Module):
    """A layer whose channels `DEAD` are zero, something complex, and a reader."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.read = nn.Linear(6, 8).double(), nn.Linear(width, 3).double()
        with torch.no_grad():
            self.make.weight[DEAD], self.make.bias[DEAD] = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.read(self.middle(self.make(x)))
        return result

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Rotary(Network):
    """Neighbouring channels are turned by the angle of their place, as LLaMA does it."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(5.0), torch.rand(4)).double()
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def middle(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * self.turns
        return torch.view_as_real(turned).flatten(2)


class Spectral(Network):
    """A filter of frequencies for each channel, its complex numbers kept as pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(3, 8, 2, dtype=torch.float64))

    def middle(self, x: Tensor) -> Tensor:
        filtered = torch.fft.rfft(x, dim=1) * torch.view_as_complex(self.filters)
        return torch.fft.irfft(filtered, n=5, dim=1, norm="ortho")


class Parts(Network):
    """Real and imaginary parts side by side."""

    def __init__(self) -> None:
        super().__init__(16)

    def middle(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(x, dim=1).conj()
        return torch.cat([spectrum.real, spectrum.imag], -1)


class Gain(Network):
    """A complex parameter for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(8, dtype=torch.complex128))

    def middle(self, x: Tensor) -> Tensor:
        return (x.relu() * self.gain).abs()


class Layer(Network):
    """A complex layer, of which two more outputs are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, dtype=torch.complex128)
        with torch.no_grad():
            self.layer.weight[[1, 2]], self.layer.bias[[1, 2]] = 0, 0

    def middle(self, x: Tensor) -> Tensor:
        return self.layer(torch.complex(x, 2 * x)).real.relu()


class Shifted(Layer):
    """Constants that are complex: their imaginary part is not lost, nor are they folded."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.make.bias[DEAD] = 0.5
            self.layer.bias[[1, 2]] = torch.tensor([1 + 1j, 2j], dtype=torch.complex128)


class FrequenciesOfChannels(Network):
    def middle(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=-1).imag


class AsOneNumber(Network):
    """All channels are the two parts of one number."""

    def __init__(self) -> None:
        super().__init__(1)
        self.two = nn.Linear(8, 2).double()

    def middle(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(self.two(x)).abs().unsqueeze(-1)


NARROW: dict[type[Network], tuple[int, int]] = {
    Rotary: (3, 4),
    Spectral: (3, 3),
    Parts: (3, 6),
    Gain: (3, 3),
    Layer: (3, 6),
    Shifted: (3, 8),
    FrequenciesOfChannels: (3, 8),
    AsOneNumber: (3, 1),
}


@pytest.mark.parametrize("kind", NARROW)
def test_complex_numbers_are_narrowed_exactly(kind: type[Network]) -> None:
    model, x = kind(), torch.randn(2, 5, 6, dtype=torch.float64)

    result = demp_fx.compile(model, x, cuts="always")

    made, read = (result.module.get_submodule(n).weight for n in ("make", "read"))
    assert (made.shape[0], read.shape[1]) == NARROW[kind]
    for training in (False, True):
        again = torch.randn(3, 5, 6, dtype=torch.float64)
        expected = model.train(training)(again)
        torch.testing.assert_close(result.module.train(training)(again), expected)
    assert not any("error" in pin.reason for pin in result.report.pinned)
