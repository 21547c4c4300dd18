"""Operations behind which dead channels are still dead."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Op = Callable[[Tensor], Tensor]


def _grid(like: Tensor) -> Tensor:
    """Places to sample at, some beyond the border."""
    return like.new_tensor([[-0.5, 0.2], [1.1, -0.1]]).expand(like.shape[0], 3, 2, 2)


def _places(like: Tensor) -> Tensor:
    """A number for each place of an image."""
    return torch.arange(36, device=like.device).view(6, 6).sin()


def _written(y: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    """A copy that something was written into."""
    y = y.clone()
    write(y)
    return y


def _late(like: Tensor) -> Tensor:
    """Which places are beyond the end of their image, in a batch of images of several sizes."""
    ends = 3 + torch.arange(like.shape[0]) % 3
    return (torch.arange(like.shape[3]) >= ends[:, None]).unsqueeze(1).unsqueeze(1)


def _rows() -> Tensor:
    """For each of six rows the one that it is put in."""
    return torch.tensor([1, 0, 3, 2, 5, 1])


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
    "divided_by_a_norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "divided_in_place": lambda x: x.clone().div_(x.square().sum(1, keepdim=True).sqrt()),
    "divided_by_the_largest": lambda x: x / (x.abs().amax(1, keepdim=True) + 1e-6),
    "divided_by_the_largest_value": lambda x: (
        x / x.abs().max(1, keepdim=True).values.clamp(min=0.1)
    ),
    "quantised": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -128, 127),
    "quantised_by_channels": lambda x: torch.fake_quantize_per_channel_affine(
        x, torch.linspace(0.1, 0.2, 8), torch.arange(8, dtype=torch.int32), 1, -128, 127
    ),
    "normalized": lambda x: F.normalize(x, dim=1),
    "divided_by_a_norm_and_more": lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-4),
    "divided_by_a_root": lambda x: x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-4),
    "divided_by_a_square": lambda x: x / (1 + (x * x).mean((2, 3), keepdim=True)),
    "doubled": lambda x: x + x,
    "squared": lambda x: x * x,
    "gated": lambda x: x * torch.sigmoid(x),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "where_zero": lambda x: torch.where(x > 1, 0.0, x),
    "where_a_zero_tensor": lambda x: torch.where(x > 1, torch.tensor(0.0, dtype=x.dtype), x),
    "masked": lambda x: x.masked_fill(_late(x), 0.0),
    "masked_in_place": lambda x: _written(x, lambda y: y.masked_fill_(_late(y), 0.0)),
    "mish_in_place": lambda x: _written(x, lambda y: F.mish(y, inplace=True)),
    "threshold_in_place": lambda x: _written(x, lambda y: F.threshold(y, 0.1, 0.0, inplace=True)),
    "masked_by_a_tensor": lambda x: x.masked_fill(_late(x), torch.tensor(0.0, dtype=x.dtype)),
    "plus_a_zero_tensor": lambda x: torch.tensor([0.0]).to(x) + x,
    "picked": lambda x: x.index_select(1, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])),
    "picked_by_indexing": lambda x: x[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])],
    "where_number": lambda x: torch.where(x[:, :1].abs() > 0.5, x, 0.0),
    "masked_fill_zero": lambda x: x.masked_fill(_places(x) > 0.5, 0.0),
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
    "largest_in_space": lambda x: x.flatten(2).max(2, keepdim=True)[0].unsqueeze(3),
    "smallest_in_space": lambda x: x - x.min(3, keepdim=True).values,
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
    "joined_with_nothing": lambda x: torch.cat([x, x.mul(0)], 1),
    "doubled_channels": lambda x: torch.cat([x, x], 1),
    "narrowed": lambda x: torch.cat([x.narrow(1, 0, 5), x.narrow(1, 5, 3)], 1),
    "softmax_space": lambda x: x * torch.softmax(x.flatten(2), 2).unflatten(2, (6, 6)),
    "instance_norm": lambda x: F.instance_norm(x),
    "cumsum_space": lambda x: x.cumsum(2),
    "cummax_space": lambda x: x.cummax(2).values - x.cummin(3).values,
    "sort_space": lambda x: x.sort(3).values,
    "topk_space": lambda x: x.flatten(2).topk(4, 2).values.unflatten(2, (2, 2)),
    "argsort_space": lambda x: x.gather(2, x.argsort(2)),
    "best_space": lambda x: x.gather(3, x.topk(3, dim=3, sorted=True).indices),
    "take_along_space": lambda x: torch.take_along_dim(x, x.argsort(3, descending=True), 3),
    "median_space": lambda x: x - x.median(2, keepdim=True).values,
    "kthvalue_space": lambda x: x - x.kthvalue(2, 3, keepdim=True).values,
    "mode_space": lambda x: x + x.round().mode(2, keepdim=True).values,
    "grid_sample": lambda x: F.grid_sample(x, _grid(x), align_corners=False),
    "grid_sample_border": lambda x: F.grid_sample(
        x, 2 * _grid(x), padding_mode="border", align_corners=False
    ),
    "unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([0.0, 0.5], dtype=x.dtype)),
    "searchsorted": lambda x: x * torch.searchsorted(torch.arange(3.0, dtype=x.dtype), x),
    "index_add_space": lambda x: torch.zeros_like(x).index_add(2, _rows(), x),
    "index_copy_space": lambda x: torch.zeros_like(x).index_copy(3, _rows(), x),
    "scatter_space": lambda x: (0 * x).scatter(2, _rows().view(6, 1).expand_as(x), x),
    "scatter_add_space": lambda x: torch.zeros_like(x).scatter_add(3, _rows().expand_as(x), x),
    "scatter_reduce_space": lambda x: x.scatter_reduce(3, x.argsort(3), x, "amin"),
    "index_put_space": lambda x: (
        x.movedim(2, 0).index_put((_rows(),), x.movedim(3, 0)).movedim(0, 2)
    ),
    "index_put_added": lambda x: (
        x.movedim(2, 0).index_put((_rows(),), x[:, :, 0], accumulate=True).movedim(0, 2)
    ),
    "index_put_points": lambda x: (
        x.permute(2, 3, 0, 1)
        .index_put((_rows(), _rows().flip(0)), x[:, :, 0, 0])
        .permute(2, 3, 0, 1)
    ),
    "index_put_mask": lambda x: x.index_put((x > 0.5,), torch.zeros((), dtype=x.dtype)),
    "scaled_where_masked": lambda x: _written(
        x.movedim(1, 3), lambda y: y.__setitem__(x.mean(1) > 0, 2 * y[x.mean(1) > 0])
    ).movedim(3, 1),
    "new_zeros": lambda x: x + x.new_zeros(x.shape),
    "zeros": lambda x: x + torch.zeros(x.shape, dtype=x.dtype),
    "ones": lambda x: x * torch.ones(x.shape, dtype=x.dtype),
    "full": lambda x: x * x.new_full(x.size()[1:], 0.5),
    "new_zeros_filled": lambda x: x.new_zeros(x.shape).index_add(2, _rows(), x),
    "joined_with_an_empty_part": lambda x: torch.cat([2 * x[:, :8], x[:, 8:]], 1),
    "joined_zeros": lambda x: torch.cat([x, torch.zeros_like(x[:, :, :1])], 2),
    "windows": lambda x: F.fold(F.unfold(x, 3, padding=1), (6, 6), 3, padding=1),
    "windows_as_channels": lambda x: F.unfold(x, 2, stride=2).unflatten(2, (3, 3)),
    "windows_scaled": lambda x: F.fold(F.unfold(x, 2, stride=2).tanh(), (6, 6), 2, stride=2),
    "written_rows": lambda x: _written(
        torch.zeros_like(x), lambda y: y[:, :, 1:].copy_(x[:, :, :-1])
    ),
    "assigned_rows": lambda x: _written(
        0 * x, lambda y: y.__setitem__((slice(None), slice(None), 2), x[:, :, 0])
    ),
    "assigned_twice": lambda x: _written(
        torch.zeros_like(x), lambda y: (y[..., 1:].copy_(x[..., 1:]), y[:, :, :3].mul_(2.0))
    ),
    "added_rows": lambda x: _written(x, lambda y: y[:, :, ::2].add_(y[:, :, 1::2])),
    "unsqueezed": lambda x: x.unsqueeze(1).squeeze(1),
    "batch_mean": lambda x: x - x.mean(0, keepdim=True),
    "einsum_space": lambda x: torch.einsum("bchw->bcwh", x),
    "lerp": lambda x: torch.lerp(x, 2 * x, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "hypot": lambda x: torch.hypot(x, x),
    "float_and_back": lambda x: x.to(torch.float32).to(torch.float64) * 0 + x,
}
