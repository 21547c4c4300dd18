"""What a forward computes and throws away: one channel of it stays, and nothing for its sake."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.cuts import Cuts


class Exits(nn.Module):
    """A classifier behind every block, of which the last one counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(nn.Conv2d(8 * k, 8, 3, padding=1) for k in (1, 2, 3))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8 * k, 16, 3), nn.BatchNorm2d(16), nn.ReLU()) for k in (2, 3, 4)
        )
        self.outputs = nn.ModuleList(nn.Linear(16, 10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, head, output in zip(self.blocks, self.heads, self.outputs, strict=True):
            x = torch.cat([x, block(x.relu())], 1)
            logits: Tensor = output(head(x).mean((2, 3)))
        return logits


@pytest.mark.parametrize("cuts", ["pays", "always", "never"])
def test_exits_that_nobody_takes(cuts: Cuts) -> None:
    torch.manual_seed(0)
    net, x = Exits().double(), torch.randn(4, 3, 9, 9).double()
    with torch.no_grad():
        net.stem.weight[0] = net.stem.bias[0] = 0  # none that anybody reads has to stay
    narrow = demp_fx.compile(net, x, cuts=cuts).module
    for train in (False, True):
        expected = net.train(train)(x)
        torch.testing.assert_close(narrow.train(train)(x), expected, rtol=1e-12, atol=1e-12)
    for k in (0, 1):
        assert narrow.get_parameter(f"heads.{k}.0.weight").shape[0] == 1
        assert narrow.get_parameter(f"outputs.{k}.weight").shape == (1, 1)
    assert narrow.get_parameter("stem.weight").shape[0] == 7
    assert narrow.get_parameter("heads.2.0.weight").shape == (16, 31, 3, 3)
    if cuts != "never":
        assert narrow.get_parameter("heads.0.0.weight").shape[1] == 1


READERS = {
    "convolution": lambda read, x: read(x),
    "sum": lambda read, x: x.sum(1, keepdim=True),
    "mean": lambda read, x: x.mean(1, keepdim=True),
    "largest": lambda read, x: x.abs().amax(1, keepdim=True),
    "norm": lambda read, x: F.layer_norm(x.movedim(1, -1), (8,)).sum(-1).unsqueeze(1),
    "length": lambda read, x: x.norm(dim=1, keepdim=True),
    "square": lambda read, x: (x.flatten(2) @ x.flatten(2).mT).sum(2)[..., None, None].sum(1, True),
    "one_by_one": lambda read, x: x[:, 3:4],
    "grouped": lambda read, x: F.conv2d(x, read.weight[:, :4], groups=2).sum(1, True),
}


@pytest.mark.parametrize("name", READERS)
def test_the_one_channel_of_a_silent_layer_holds_what_its_readers_count_on(name: str) -> None:
    """None of its channels ever fires on the data, and one is kept: what makes it silent stays."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.read = nn.Conv2d(8, 8, 1)
            nn.init.constant_(self.conv.weight, -1.0)
            nn.init.constant_(self.conv.bias, 8.0)
            nn.init.constant_(self.stem.bias, 3.0)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            y: Tensor = x + READERS[name](self.read, self.conv(x).relu())
            return y

    torch.manual_seed(0)
    net, x = Net().double().eval(), torch.randn(4, 3, 5, 5).double()
    narrow = demp_fx.compile(net, x, calibration=[x], cuts="always", verify=False).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["glu", "gru", "pixel_shuffle", "maxout"])
def test_a_single_channel_is_needed_though_it_is_on_no_axis(how: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.two, self.four = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 4)
            self.gru, self.out = nn.GRU(8, 1, batch_first=True), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            match how:
                case "glu":
                    x = F.glu(self.two(x))
                case "gru":
                    x, _ = self.gru(x)
                case "pixel_shuffle":
                    x = F.pixel_shuffle(self.four(x).mT.unsqueeze(-1), 2).flatten(2).mT
                case "maxout":
                    x = torch.maximum(*self.two(x).chunk(2, -1))
            y: Tensor = self.out(x.sigmoid())
            return y

    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(4, 5, 3).double()
    narrow = demp_fx.compile(net, x).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("stem.weight").shape == (8, 3)
