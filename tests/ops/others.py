"""Operations that make something else of zeros, or mix, count or move channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Op = Callable[[Tensor], Tensor]

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
    "norm_of_inverses": lambda x: x + x.norm(-1, dim=1, keepdim=True),
    "divided_by_what_may_be_zero": lambda x: x / (x.norm(dim=1, keepdim=True) - 0.1),
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
}  # fmt: skip
