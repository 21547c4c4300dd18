"""Whatever the network and whatever is dead in it: the narrow module computes the same function."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import demp_fx
from tests.zoo.kill import relative_error

EVAL_ERROR = 1e-10
TRAIN_ERROR = 1e-9
SIZE = 24  # three blocks that each lose a border and halve still leave one pixel

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "none": nn.Identity,
}

# --- modules -------------------------------------------------------------------------------------


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, activation."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, padding: int = 1, groups: int = 1,
        bias: bool = False, act: str = "relu",
    ) -> None:  # fmt: skip
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=padding, groups=groups, bias=bias),
            nn.BatchNorm2d(outputs),
            ACTIVATIONS[act](),
        )


class ResidualModule(nn.Module):
    def __init__(self, inputs: int, outputs: int, act: str) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, act=act)
        self.second = ConvNorm(outputs, outputs, act="none")
        self.project = ConvNorm(inputs, outputs, 1, 0, act="none") if inputs != outputs else None
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        around = x if self.project is None else self.project(x)
        return self.act(self.second(self.first(x)) + around)


class DenseModule(nn.Module):
    """Norm first, and what is new goes beside what came in, as in a DenseNet."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(inputs + i * growth) for i in range(2))
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs + i * growth, growth, 3, padding=1) for i in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], dim=1)
        return x


class InvertedModule(nn.Module):
    """Widen, filter each channel by itself, narrow; around it the input."""

    def __init__(self, inputs: int, hidden: int, act: str) -> None:
        super().__init__()
        self.widen = ConvNorm(inputs, hidden, 1, 0, act=act)
        self.each = ConvNorm(hidden, hidden, 3, 1, groups=hidden, act=act)
        self.narrow = ConvNorm(hidden, inputs, 1, 0, act="none")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.each(self.widen(x)))


class SqueezeExciteModule(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, hidden, 1)
        self.excite = nn.Conv2d(hidden, inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.excite(scale))


class SplitModule(nn.Module):
    """Half of the channels pass, the others are convolved; the order changes."""

    def __init__(self, inputs: int, how: str) -> None:
        super().__init__()
        self.half = inputs // 2
        self.how = how
        self.conv = ConvNorm(inputs - self.half, inputs - self.half)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "split":
            a, b = x.split([self.half, x.shape[1] - self.half], dim=1)
        elif self.how == "chunk":
            b, a = x.chunk(2, dim=1)  # the first is the larger one where they are not equal
        else:
            a, b = x[:, : self.half], x[:, self.half :]
        return torch.cat([self.conv(b), a], dim=1)


class ShuffleModule(nn.Module):
    """A grouped convolution, and the groups mixed by a transposition, as in a ShuffleNet."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.groups = 2 if inputs % 2 == 0 else 1
        self.conv = ConvNorm(inputs, inputs, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2)
        return x.reshape(n, c, h, w)


class TwiceModule(nn.Module):
    """One convolution with its norm, called two times."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.shared = ConvNorm(inputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(x))


# --- what hypothesis draws: specifications that print as they are written -------------------------


@dataclass(frozen=True)
class Conv:
    out: int
    kernel: int
    padding: int
    bias: bool
    act: str
    pool: str

    def build(self, width: int) -> tuple[nn.Module, int]:
        pools = {"max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(2), "none": nn.Identity()}
        conv = ConvNorm(
            width,
            self.out,
            self.kernel,
            min(self.padding, self.kernel // 2),
            1,
            self.bias,
            self.act,
        )
        return nn.Sequential(conv, pools[self.pool]), self.out


@dataclass(frozen=True)
class Residual:
    out: int | None
    act: str

    def build(self, width: int) -> tuple[nn.Module, int]:
        outputs = self.out or width
        return ResidualModule(width, outputs, self.act), outputs


@dataclass(frozen=True)
class Dense:
    growth: int

    def build(self, width: int) -> tuple[nn.Module, int]:
        return DenseModule(width, self.growth), width + 2 * self.growth


@dataclass(frozen=True)
class Inverted:
    hidden: int
    act: str

    def build(self, width: int) -> tuple[nn.Module, int]:
        return InvertedModule(width, self.hidden, self.act), width


@dataclass(frozen=True)
class SqueezeExcite:
    hidden: int

    def build(self, width: int) -> tuple[nn.Module, int]:
        return SqueezeExciteModule(width, self.hidden), width


@dataclass(frozen=True)
class Split:
    how: str

    def build(self, width: int) -> tuple[nn.Module, int]:
        return SplitModule(width, self.how), width


@dataclass(frozen=True)
class Shuffle:
    def build(self, width: int) -> tuple[nn.Module, int]:
        return ShuffleModule(width), width


@dataclass(frozen=True)
class Twice:
    def build(self, width: int) -> tuple[nn.Module, int]:
        return TwiceModule(width), width


Block = Conv | Residual | Dense | Inverted | SqueezeExcite | Split | Shuffle | Twice

widths = st.integers(2, 8)
acts = st.sampled_from(list(ACTIVATIONS))
blocks = st.one_of(
    st.builds(
        Conv, out=widths, kernel=st.sampled_from([1, 3]), padding=st.integers(0, 1),
        bias=st.booleans(), act=acts, pool=st.sampled_from(["none", "max", "avg"]),
    ),
    st.builds(Residual, out=st.none() | widths, act=acts),
    st.builds(Dense, growth=st.integers(1, 4)),
    st.builds(Inverted, hidden=widths, act=acts),
    st.builds(SqueezeExcite, hidden=st.integers(1, 4)),
    st.builds(Split, how=st.sampled_from(["split", "chunk", "slice"])),
    st.builds(Shuffle),
    st.builds(Twice),
)  # fmt: skip
programs = st.lists(blocks, min_size=1, max_size=3)


def _network(program: list[Block], flat: bool, seed: int) -> nn.Module:
    """Stem, the blocks, and a head that reads every pixel (`flat`) or their mean."""
    torch.manual_seed(seed)
    stem, width = Conv(6, 3, 1, False, "relu", "none").build(3)
    body = [stem]
    for spec in program:
        block, width = spec.build(width)
        body.append(block)
    pixels = 2 if flat else 1
    head = [
        nn.AdaptiveAvgPool2d(pixels),
        nn.Flatten(),
        nn.Linear(width * pixels**2, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 4),
    ]
    return nn.Sequential(*body, *head).double()


@torch.no_grad()
def _kill(model: nn.Module, seed: int) -> None:
    """Kill at random: scales (the shift with them or not), filters, whole layers now and then."""
    rng = torch.Generator().manual_seed(seed)

    def chosen(width: int, fractions: list[float]) -> Tensor:
        fraction = fractions[int(torch.randint(len(fractions), (), generator=rng))]
        return torch.rand(width, generator=rng) < fraction

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0.0, 0.3, generator=rng)
            module.running_var.uniform_(0.5, 2.0, generator=rng)
            module.weight.uniform_(0.5, 1.5, generator=rng)
            module.bias.normal_(0.0, 0.5, generator=rng)
            dead = chosen(module.num_features, [0.0, 0.3, 0.6, 0.6, 1.0])
            module.weight[dead] = 0.0
            module.bias[dead & chosen(module.num_features, [0.0, 0.5, 1.0])] = 0.0
        elif isinstance(module, nn.Conv2d):
            module.weight[chosen(module.out_channels, [0.0, 0.0, 0.0, 0.3])] = 0.0
            module.weight[:, chosen(module.weight.shape[1], [0.0, 0.0, 0.0, 0.3])] = 0.0


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(program=programs, flat=st.booleans(), seed=st.integers(0, 2**16))
def test_a_narrowed_network_computes_what_the_original_computes(
    program: list[Block], flat: bool, seed: int
) -> None:
    model = _network(program, flat, seed)
    _kill(model, seed)
    example, fresh = (
        torch.randn(batch, 3, size, size, dtype=torch.float64)
        for batch, size in ((2, SIZE), (5, SIZE + 3))
    )

    narrow = demp_fx.compile(model.eval(), example).module

    with torch.no_grad():
        assert relative_error(narrow(fresh), model(fresh)) <= EVAL_ERROR
        expected = copy.deepcopy(model).train()(fresh)
        assert relative_error(copy.deepcopy(narrow).train()(fresh), expected) <= TRAIN_ERROR
    assert list(narrow.state_dict()) == list(model.state_dict())
    for key, value in narrow.state_dict().items():
        wide = model.state_dict()[key]
        assert all(0 < n <= m for n, m in zip(value.shape, wide.shape, strict=True)), key
