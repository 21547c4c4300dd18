"""One op on the channel path, behind dead channels: exact for any op, narrower where possible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_fx

CHANNELS, DEAD = 8, (1, 2, 5)

Op = Callable[[Tensor], Tensor]

# Elementwise functions that keep zeros zero: the channels behind them go as well.
ZERO_STAYS: dict[str, Op] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "hardtanh": F.hardtanh,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "hardshrink": F.hardshrink,
    "abs": torch.abs,
    "neg": torch.neg,
    "sign": torch.sign,
    "square": torch.square,
    "sin": torch.sin,
    "atan": torch.atan,
    "expm1": torch.expm1,
    "erf": torch.erf,
    "pow3": lambda x: x**3,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_min": lambda x: x.clamp_min(0),
    "scaled": lambda x: 0.5 * x,
    "divided": lambda x: x / 3,
    "doubled": lambda x: x + x,
    "squared": lambda x: x * x,
    "gated": lambda x: x * torch.sigmoid(x),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "max_pool_padded": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "avg_pool_padded": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "avg_pool_uncounted": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "avg_pool_divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, 3),
    "lp_pool": lambda x: F.lp_pool2d(x.abs() + 0 * x, 2, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "space_mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "space_max": lambda x: x * x.amax((2, 3), keepdim=True),
    "squeeze_excite": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "pad_space": lambda x: F.pad(x, (1, 1, 1, 1)),
    "pad_reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "flip_space": lambda x: x.flip(3),
    "roll_space": lambda x: x.roll((1, 2), (2, 3)),
    "transpose_space": lambda x: x.transpose(2, 3),
    "crop": lambda x: x[:, :, 1:5, 2:],
    "channels_last_and_back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "tokens_and_back": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (6, 6)),
    "clone": lambda x: x.clone().contiguous(),
    "in_place_relu": lambda x: F.relu(x, inplace=True),
    "in_place_add": lambda x: x.add_(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "glue": lambda x: torch.cat([x[:, :4], x[:, 4:]], 1),
    "swapped": lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
    "swapped_chunks": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split_unequal": lambda x: torch.cat(x.split([3, 5], 1), 1),
    "doubled_channels": lambda x: torch.cat([x, x], 1),
    "narrowed": lambda x: torch.cat([x.narrow(1, 0, 5), x.narrow(1, 5, 3)], 1),
    "softmax_space": lambda x: x * torch.softmax(x.flatten(2), 2).unflatten(2, (6, 6)),
    "instance_norm": lambda x: F.instance_norm(x),
    "cumsum_space": lambda x: x.cumsum(2),
    "unsqueezed": lambda x: x.unsqueeze(1).squeeze(1),
    "batch_mean": lambda x: x - x.mean(0, keepdim=True),
    "einsum_space": lambda x: torch.einsum("bchw->bcwh", x),
    "lerp": lambda x: torch.lerp(x, 2 * x, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "hypot": lambda x: torch.hypot(x, x),
    "float_and_back": lambda x: x.to(torch.float32).to(torch.float64) * 0 + x,
}

# Zeros become another constant, or the channels are mixed, counted or shuffled.
OTHERS: dict[str, Op] = {
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "exp": torch.exp,
    "cos": torch.cos,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "plus_one": lambda x: x + 1,
    "one_minus": lambda x: 1 - x,
    "reciprocal": lambda x: 1 / (x.abs() + 1),
    "greater": lambda x: (x > 0.1).to(x.dtype) + x,
    "zero_test": lambda x: (x == 0).to(x.dtype) + x,
    "fmax": lambda x: torch.fmax(x, torch.full_like(x, 0.3)),
    "round": torch.round,
    "softmax_channels": lambda x: torch.softmax(x, 1),
    "log_softmax_channels": lambda x: torch.log_softmax(x, 1),
    "softmin_channels": lambda x: F.softmin(x, 1),
    "layer_norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    "group_norm": lambda x: F.group_norm(x, 4),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "normalize": lambda x: F.normalize(x + 0.1, dim=1),
    "centred": lambda x: x - x.mean(1, keepdim=True),
    "standardised": lambda x: x / (x.std(1, keepdim=True) + 1),
    "channel_max": lambda x: x - x.amax(1, keepdim=True),
    "channel_sum": lambda x: x + x.sum(1, keepdim=True),
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: (x + 1).cumprod(1),
    "sort": lambda x: x.sort(1).values,
    "topk": lambda x: torch.cat([x.topk(4, 1).values, x[:, :4]], 1),
    "argmax": lambda x: x + x.argmax(1, keepdim=True),
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "index": lambda x: x[:, [7, 6, 5, 4, 3, 2, 1, 0]],
    "index_select": lambda x: x.index_select(1, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])),
    "gather_channels": lambda x: x.gather(1, torch.zeros_like(x, dtype=torch.int64) + 3) + x,
    "every_other": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "shuffle": lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "pixel_shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "pad_channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "pad_ones": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "outer": lambda x: torch.einsum("bchw,bdhw->bcd", x, x).unsqueeze(-1),
    "self_product": lambda x: torch.matmul(x.flatten(2).transpose(1, 2), x.flatten(2)).unsqueeze(1),
    "stacked": lambda x: torch.stack([x, 2 * x], 2).flatten(1, 2),
    "unbound": lambda x: torch.stack(x.unbind(1), 1),
    "first": lambda x: x[:, 0:1] + x,
    "selected": lambda x: x[:, 3].unsqueeze(1) + x,
    "maximum_of_halves": lambda x: torch.maximum(x[:, :4], x[:, 4:]),
    "glu": lambda x: F.glu(x, 1),
    "cross_entropy_like": lambda x: x.logsumexp(1, keepdim=True),
    "norm": lambda x: x.norm(dim=1, keepdim=True),
    "add_index": lambda x: x + torch.arange(8.0, dtype=x.dtype).view(1, -1, 1, 1),
    "fill_slice": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1),
    "masked_fill": lambda x: x.masked_fill(x > 1, 1.0),
    "cdist": lambda x: torch.cdist(x.flatten(2), x.flatten(2)).unsqueeze(1),
    "fold": lambda x: F.fold(F.unfold(x, 3, padding=1), (6, 6), 3, padding=1),
    "channels_as_batch": lambda x: x.flatten(0, 1).unsqueeze(1),
    "mean_of_everything": lambda x: x - x.mean(),
    "view_as_depth": lambda x: F.max_pool3d(x.unsqueeze(1), (2, 1, 1)).squeeze(1),
    "pool_channels": lambda x: F.avg_pool3d(x.unsqueeze(1), (2, 1, 1)).squeeze(1),
    "written_slice": lambda x: _write(x),
}  # fmt: skip


def _write(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 2:4] = 2 * x[:, 2:4]
    return y


class OneOp(nn.Module):
    """conv - norm - op - conv, with `DEAD` channels of the norm zeroed, or constant."""

    def __init__(self, op: Op, constant: bool, padding: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op = op
        self.make = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.normal_()
            self.norm.weight[list(DEAD)] = 0
            if not constant:
                self.norm.bias[list(DEAD)] = 0
        self.to(torch.float64).eval()
        with torch.no_grad():
            shape = op(self.norm(self.make(torch.randn(2, 3, 6, 6, dtype=torch.float64)))).shape
        self.read = nn.Conv2d(shape[1], 5, min(3, *shape[2:]), padding=padding).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.op(self.norm(self.make(x))))


def error(model: nn.Module, narrow: nn.Module, training: bool) -> float:
    """Largest relative difference on fresh inputs of another batch size."""
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    a, b = model.train(training)(x), narrow.train(training)(x)
    return float(((a - b).abs().max() / a.abs().max()).detach())


def width(model: nn.Module) -> int:
    return model.get_submodule("make").weight.shape[0]


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("constant", [False, True], ids=["zero", "constant"])
@pytest.mark.parametrize("name", [*ZERO_STAYS, *OTHERS])
def test_function_is_kept(name: str, constant: bool, padding: int) -> None:
    model = OneOp({**ZERO_STAYS, **OTHERS}[name], constant, padding)
    result = demp_fx.compile(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert error(model, result.module, training=False) < 1e-10
    assert error(model, result.module, training=True) < 1e-10


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("softmax_channels", "_softmax"),
        ("layer_norm", "layer_norm"),
        ("cumsum", "cumsum"),
        ("sort", "sort"),
        ("pad_channels", "constant_pad_nd"),
        ("channel_sum", "sum"),
        ("standardised", "std"),
    ],
)
def test_what_mixes_channels_is_pinned_and_named(name: str, op: str) -> None:
    result = demp_fx.compile(OneOp(OTHERS[name], False, 1), torch.randn(2, 3, 6, 6).double())
    pins = [pin for pin in result.report.pinned if "make.weight[0]" in pin.members]
    assert any(op in pin.op for pin in pins)
    assert all(__file__ in str(pin.source) for pin in pins)


@pytest.mark.parametrize("name", ZERO_STAYS)
def test_zeros_are_cut(name: str) -> None:
    model = OneOp(ZERO_STAYS[name], constant=False, padding=1)
    result = demp_fx.compile(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert width(result.module) == CHANNELS - len(DEAD)
    assert result.report.carriers == 0
