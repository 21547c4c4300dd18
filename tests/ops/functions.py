"""Functions of numbers, products, statistics and layers without weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

Op = Callable[[Tensor], Tensor]


def _matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    """The same uneven numbers every time."""
    return torch.arange(rows * columns, dtype=like.dtype).cos().view(rows, columns)


def _grid(like: Tensor) -> Tensor:
    """Places to sample at."""
    return like.new_tensor([[-0.5, 0.2], [0.9, -0.1]]).expand(like.shape[0], 3, 2, 2)


FUNCTIONS: dict[str, Op] = {
    "logit": lambda x: torch.logit(torch.sigmoid(x), eps=1e-3),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.5),
    "log1p": lambda x: torch.log1p(x.abs()),
    "remainder": lambda x: torch.remainder(x + 0.25, 2.0) + x,
    "fmod": lambda x: torch.fmod(x, 0.7) + x,
    "sinc": torch.sinc,
    "bessel": torch.special.i0e,
    "xlogy": lambda x: torch.xlogy(x, x.abs() + 1),
    "nan_to_num": lambda x: torch.nan_to_num(x / x) + x,
    "zero_division": lambda x: torch.where(x != 0, 1 / torch.where(x != 0, x, 1.0), 0.5),
    "copysign": lambda x: torch.copysign(torch.ones_like(x), x + 0.1),
    "heaviside": lambda x: torch.heaviside(x, torch.full_like(x, 0.5)) + x,
    "float_power": lambda x: torch.float_power(x.abs() + 0.1, 0.5),
    "power_of_zero": lambda x: x**0,
    "negative_power": lambda x: (x.abs() + 0.5) ** -1,
    "threshold": lambda x: F.threshold(x, 0.2, -1.0),
    "softshrink": lambda x: F.softshrink(x) + 0.5 * x,
    "prelu": lambda x: F.prelu(x, torch.linspace(0, 1, 8, dtype=x.dtype)),
    "logaddexp": lambda x: torch.logaddexp(x, -x),
    "atan2": lambda x: torch.atan2(x, x.abs() + 1),
    "maximum_of_constant": lambda x: torch.maximum(x, torch.tensor(0.2, dtype=x.dtype)),
    "clamp_tensor": lambda x: x.clamp(min=torch.full((8, 1, 1), 0.1, dtype=x.dtype)),
    "tensordot": lambda x: torch.tensordot(x, _matrix(8, 8, x), ([1], [0])).movedim(-1, 1),
    "matmul_constant": lambda x: (x.movedim(1, -1) @ _matrix(8, 5, x)).movedim(-1, 1),
    "baddbmm": lambda x: torch.baddbmm(x.flatten(2), _matrix(8, 8, x).expand(x.shape[0], 8, 8),
                                       x.flatten(2)).unflatten(2, (6, 6)),
    "kron": lambda x: torch.kron(x[:, :, :2, :2], torch.ones(1, 2, 1, 1, dtype=x.dtype)),
    "outer_sum": lambda x: x.mean((2, 3))[:, :, None, None] + x.mean((2, 3))[:, None, :, None],
    "bilinear_form": lambda x: torch.einsum("bchw,cd,bdhw->bhw", x, _matrix(8, 8, x),
                                            x).unsqueeze(1),
    "einsum_diagonal": lambda x: torch.einsum("bchh->bch", x).unsqueeze(-1),
    "cdist_channels": lambda x: torch.cdist(x.flatten(2).mT, x.flatten(2).mT).unsqueeze(1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.roll(1, 3), 1, 0.1).unsqueeze(1),
    "pairwise_distance": lambda x: F.pairwise_distance(x, 2 * x, eps=0.1).unsqueeze(1),
    "fft_channels": lambda x: torch.fft.fft(x, dim=1).real,
    "fft_space": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=(6, 6)),
    "complex": lambda x: torch.view_as_real(torch.complex(x, 1 - x)).flatten(3),
    "polar": lambda x: torch.polar(x.abs(), x).imag,
    "median": lambda x: x - x.median(1, keepdim=True).values,
    "kthvalue": lambda x: x - x.kthvalue(2, 1, keepdim=True).values,
    "mode": lambda x: x + x.round().mode(1, keepdim=True).values,
    "quantile": lambda x: x - x.quantile(0.3, dim=1, keepdim=True),
    "cummax": lambda x: x.cummax(1).values,
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "diff": lambda x: x.diff(dim=1),
    "prod_channels": lambda x: x + (x + 1).prod(1, keepdim=True),
    "count_nonzero": lambda x: x + x.count_nonzero(1).unsqueeze(1),
    "nonzero_share": lambda x: x * (x != 0).to(x.dtype).mean(1, keepdim=True),
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([0.0, 0.5], dtype=x.dtype)) + x,
    "searchsorted_rows": lambda x: torch.searchsorted(x.sort(-1).values, x.contiguous()) + x,
    "ones_of_a_shape": lambda x: torch.ones(x.shape, dtype=x.dtype) - x,
    "numbers_of_a_size": lambda x: x.new_full((x.size(1), 1, 1), 0.3) + x,
    "numbers_of_a_literal_size": lambda x: x.new_full((8, 1, 1), 0.3) + x,
    "number_in_a_tensor": lambda x: x.new_full((x.size(1), 1, 1), torch.tensor(0.3)) + x,
    "like_with_a_number_in_a_tensor": lambda x: x * torch.full_like(x, torch.tensor(0.3)),
    "zeros_of_a_literal_size": lambda x: torch.zeros(x.size(0), 8, 1, 1, dtype=x.dtype) + x,
    "one_number_expanded": lambda x: x[:1, :1, :1, :1].expand_as(x) + x,
    "one_number_broadcast": lambda x: torch.broadcast_to(x.mean(), (8, 6, 6)) * x,
    "windows_of_constants": lambda x: F.fold(F.unfold(x, 3) + 1, (6, 6), 3),
    "windows_back": lambda x: F.fold(x.flatten(2)[..., :9], (6, 6), 2, stride=2),
    "windows_unbatched": lambda x: torch.stack([F.unfold(t, 3, padding=1) for t in x[:2]]
                                               ).mean(0, keepdim=True).unflatten(2, (6, 6)),
    "one_hot": lambda x: F.one_hot(x.argmax(1), 8).movedim(-1, 1) + x,
    "var_channels": lambda x: x + x.var(1, keepdim=True, unbiased=False),
    "norm_of_weight_size": lambda x: x / x.shape[1],
    "renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
    "rms_norm": lambda x: F.rms_norm(x.movedim(1, -1), (8,), eps=1e-5).movedim(-1, 1),
    "layer_norm_all": lambda x: F.layer_norm(x, (8, 6, 6)),
    "batch_norm_plain": lambda x: F.batch_norm(x, None, None, training=True),
    "group_norm_one": lambda x: F.group_norm(x, 1),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=False),
    "gumbel_temperature": lambda x: F.softmax(x / 0.5, 1) * x,
    "grid_sample": lambda x: F.grid_sample(x, _grid(x), align_corners=False),
    "affine_grid": lambda x: F.grid_sample(x, F.affine_grid(
        torch.eye(2, 3, dtype=x.dtype).expand(x.shape[0], 2, 3), [x.shape[0], 1, 6, 6], False),
        align_corners=False),
    "unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "fractional_sizes": lambda x: F.interpolate(x, size=5, mode="bicubic"),
    "area": lambda x: F.interpolate(x, size=4, mode="area"),
    "antialias": lambda x: F.interpolate(x, size=4, mode="bilinear", antialias=True),
    "conv_constant": lambda x: F.conv2d(x, _matrix(4, 8, x)[:, :, None, None]),
    "conv_depthwise_constant": lambda x: F.conv2d(x, _matrix(8, 9, x).view(8, 1, 3, 3), groups=8),
    "conv_over_channels": lambda x: F.conv1d(x.mean((2, 3)).unsqueeze(1), _matrix(1, 3, x)[None],
                                             padding=1).squeeze(1)[:, :, None, None] * x,
    "pad_circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "pad_negative": lambda x: F.pad(x, (-1, 0, 0, 0, -2, 1)),
    "fake_quantize": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 255),
    "fake_quantize_channels": lambda x: torch.fake_quantize_per_channel_affine(
        x, torch.full((8,), 0.1), torch.full((8,), 3, dtype=torch.int32), 1, 0, 255),
    "checked": lambda x: torch.utils.checkpoint.checkpoint(torch.sigmoid, x, use_reentrant=False),
    "out": lambda x: torch.add(x.detach(), 1.0, out=torch.empty_like(x).detach()),
    "detached": lambda x: x - x.detach().mean(1, keepdim=True),
    "half_and_back": lambda x: x + 0 * x.to(torch.bfloat16).to(x.dtype),
    "integers": lambda x: (x * 4).to(torch.int64).to(x.dtype) + x,
    "bits": lambda x: ((x * 4).to(torch.int64) & 3).to(x.dtype) + x,
    "meshgrid": lambda x: x + torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(6.0),
                                                         indexing="ij")).sum(0).to(x.dtype),
    "tile": lambda x: x.tile(1, 2, 1, 1),
    "broadcast_to": lambda x: x.mean(1, keepdim=True).broadcast_to(x.shape) + x,
    "column_stack": lambda x: torch.hstack([x, x[:, :2]]),
    "dstack": lambda x: torch.cat(torch.tensor_split(x, 3, 1)[::-1], 1),
    "block_view": lambda x: x.view(-1, 2, 4, 6, 6).sum(2),
    "meaned_groups": lambda x: x.view(-1, 4, 2, 6, 6).amax(1),
    "view_dtype": lambda x: x.contiguous().view(torch.int64).view(torch.float64),

}  # fmt: skip
