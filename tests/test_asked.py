"""What the user wants to stay although it is dead: layers by name, widths that hardware likes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.cuts import Cuts
from demp_fx.errors import UsageError
from demp_fx.passes import make_plan

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Blocks whose results are joined; of each, five channels are dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks = nn.Conv2d(3, 12, 1), nn.ModuleList(Block(12) for _ in range(2))
        self.head = nn.Conv2d(24, 10, 1)
        self.double().eval()
        with torch.no_grad():
            for block in self.blocks:
                for p in block.norm.parameters():
                    p[:5] = 0

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](self.stem(x))
        return self.head(torch.cat([first, self.blocks[1](first)], 1))


def widths(narrow: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape[:2]) for n, p in narrow.named_parameters() if p.dim() > 1}


def test_without_a_wish_all_that_is_dead_goes() -> None:
    assert widths(demp_fx.compile(Net(), X).module) == {
        "stem.weight": (12, 3), "blocks.0.conv.weight": (7, 12), "blocks.1.conv.weight": (7, 7),
        "head.weight": (10, 14),
    }  # fmt: skip


@pytest.mark.parametrize("keep", ["blocks.1", ["blocks.1.conv"], ["*.1.conv"]])
def test_a_layer_that_is_kept_keeps_its_shape(keep: str | list[str]) -> None:
    """So does what it reads; what it is not tied to gets narrower."""
    net = Net()
    result = demp_fx.compile(net, X, keep=keep)
    assert widths(result.module) == {
        "stem.weight": (12, 3), "blocks.0.conv.weight": (12, 12), "blocks.1.conv.weight": (12, 12),
        "head.weight": (10, 19),
    }  # fmt: skip
    assert any("it is to be kept" in pin.reason for pin in result.report.pinned)


@pytest.mark.parametrize("cuts", ["always", "never"])
def test_a_grouped_convolution_keeps_the_inputs_of_its_blocks(cuts: Cuts) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        for p in net[0].double().parameters():
            p[[0, 5]] = 0
    kept = demp_fx.compile(net.double().eval(), X, keep=["1"], cuts=cuts).module
    assert kept.get_parameter("1.weight").shape == (6, 4, 3, 3)
    assert kept.get_parameter("0.weight").shape[0] == (6 if cuts == "always" else 8)
    torch.testing.assert_close(kept(X), net(X), rtol=1e-12, atol=1e-12)


def test_widths_are_rounded_up_to_a_multiple() -> None:
    net = Net()
    result = demp_fx.compile(net, X, round_to=4)
    assert widths(result.module) == {
        "stem.weight": (12, 3), "blocks.0.conv.weight": (8, 12), "blocks.1.conv.weight": (8, 8),
        "head.weight": (10, 16),
    }  # fmt: skip
    torch.testing.assert_close(result.module(X), net(X), rtol=1e-12, atol=1e-12)


def test_a_width_is_never_larger_than_it_was() -> None:
    assert widths(demp_fx.compile(Net(), X, round_to=64).module) == widths(Net())


def test_the_pass_takes_wishes_as_well() -> None:
    graph = demp_fx.trace(Net(), X)
    assert make_plan(graph, keep=["stem", "blocks", "head"]).nodes == {}
    narrow = demp_fx.passes.narrow(graph, make_plan(graph, round_to=4))
    assert widths(narrow)["blocks.0.conv.weight"] == (8, 12)


def test_a_wish_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no layer with parameters fits 'blocks\.2'"):
        demp_fx.compile(Net(), X, keep=["blocks.2"])
    with pytest.raises(UsageError, match="multiples of 0"):
        demp_fx.compile(Net(), X, round_to=0)
