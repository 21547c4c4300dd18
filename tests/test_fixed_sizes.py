"""Networks that take one batch size, or that code ties to one, and outputs of all kinds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import demp_fx


class Net(nn.Module):
    """Linear - ReLU - linear, with half of its hidden channels dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.i, self.o = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        with torch.no_grad():
            self.i.weight[::2] = self.i.bias[::2] = 0

    def both(self, x: Tensor) -> Tensor:
        result: Tensor = self.o(self.i(x).relu())
        return result


class Masked(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[self.mask]


class Asserting(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == 4, "four nodes"
        return self.both(x)


@pytest.mark.parametrize("kind", [Masked, Asserting])
def test_an_original_of_one_batch_size_is_compared_at_it(kind: type[Net]) -> None:
    net, x = kind(), torch.randn(4, 6)
    result = demp_fx.compile(net, x)
    assert result.module.get_submodule("i").weight.shape == (4, 6)
    torch.testing.assert_close(result.module(x), net(x))


class Looping(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.both(row) for row in x])


def test_a_loop_over_the_batch_holds_for_its_size_and_says_so(
    capfd: pytest.CaptureFixture[str],
) -> None:
    result = demp_fx.compile(Looping(), torch.randn(4, 6))
    proof = result.report.verification
    assert proof is not None
    assert proof.fixed
    assert proof.batch == 4
    (warning,) = (w for w in result.report.warnings if "example's sizes only" in w)
    assert "test_fixed_sizes.py" in warning
    assert capfd.readouterr().err == ""


@dataclass
class Out:
    logits: Tensor
    hidden: Tensor | None = None


class Structured(Net):
    def forward(self, x: Tensor) -> Out:
        return Out(logits=self.both(x))


def test_a_dataclass_is_an_output() -> None:
    net, x = Structured(), torch.randn(4, 6)
    narrow = demp_fx.compile(net, x).module
    assert narrow.get_submodule("i").weight.shape == (4, 6)
    torch.testing.assert_close(narrow(x).logits, net(x).logits)


class Box:
    def __init__(self, value: Tensor) -> None:
        self.value = value


@torch.fx.wrap
def boxed(value: Tensor) -> Box:
    return Box(value)


class Hiding(Net):
    def forward(self, x: Tensor) -> Box:
        return boxed(self.both(x))


def test_an_output_that_hides_its_tensors_is_refused() -> None:
    with pytest.raises(demp_fx.errors.VerificationError, match="no tensors are seen in a Box"):
        demp_fx.compile(Hiding(), torch.randn(4, 6))


class Deciding(nn.Module):
    """Small images are not pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        with torch.no_grad():
            self.i.weight[::2] = 0
            self.i.bias[::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        made = self.i(x).relu()
        if made.shape[-1] > 9:
            made = made[..., ::2, ::2]
        result: Tensor = self.o(made).mean((2, 3))
        return result


def test_code_that_decides_by_the_size_of_an_image_is_noticed() -> None:
    result = demp_fx.compile(Deciding(), torch.randn(2, 3, 8, 8))
    proof = result.report.verification
    assert proof is not None
    assert proof.sized
    (warning,) = (w for w in result.report.warnings if "inputs of other sizes" in w)
    assert "if made.shape[-1] > 9" in warning


class Pieces(nn.Module):
    """Looks at three steps of a sequence at a time."""

    def __init__(self, unrolled: bool) -> None:
        super().__init__()
        self.unrolled, self.i, self.o = unrolled, nn.Linear(6, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.i.weight[::2] = 0
            self.i.bias[::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x).relu()
        if self.unrolled:
            x = torch.cat([part - part.mean(1, keepdim=True) for part in x.split(3, 1)], 1)
        result: Tensor = self.o(x)
        return result


@pytest.mark.parametrize("unrolled", [False, True])
def test_code_that_is_unrolled_for_the_length_of_a_sequence_is_noticed(unrolled: bool) -> None:
    result = demp_fx.compile(Pieces(unrolled), torch.randn(2, 9, 6))
    assert result.module.get_parameter("i.weight").shape[0] == 4
    assert any("inputs of other sizes" in w for w in result.report.warnings) is unrolled


class Prefixed(nn.Module):
    """Two tokens of its own before those of the input; the last block's are not read any more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Parameter(torch.randn(1, 2, 8))
        self.embed, self.mix = nn.Linear(6, 8), nn.Linear(8, 8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), self.embed(x)], 1)
        x = x + self.mix(x).softmax(1)
        x = x + self.inner(x).relu()
        result: Tensor = self.head(x[:, 2:].mean(1))
        return result


def test_tokens_of_the_input_are_as_many_as_it_has() -> None:
    net = Prefixed()
    narrow = demp_fx.compile(net, torch.randn(2, 5, 6).double(), cuts="always").module
    for length in (5, 9):
        x = torch.randn(3, length, 6).double()
        torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


def test_sequences_at_which_samples_are_mixed_are_no_reason_to_refuse() -> None:
    """Half as long ones make half as many rows: two samples fit into the one row that is left."""

    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv1d(3, 8, 3, padding=1), nn.MaxPool1d(2)
            self.head = nn.Linear(8 * 16, 3)
            with torch.no_grad():
                self.conv.weight[::2] = self.conv.bias[::2] = 0

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.pool(self.conv(x)).view(-1, 8 * 16))
            return result

    torch.manual_seed(0)
    model = Flattening()
    assert model(torch.randn(2, 3, 17)).shape == (1, 3)
    result = demp_fx.compile(model, torch.randn(2, 3, 32))
    assert result.module.get_parameter("head.weight").shape == (3, 4 * 16)
    assert not any("sizes" in note for note in result.report.assumptions)
