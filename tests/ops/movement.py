"""Indexing, scattering and writing in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Op = Callable[[Tensor], Tensor]


def _rotated(like: Tensor) -> Tensor:
    """For each place the number of another channel."""
    size = like.shape[1]
    return ((torch.arange(size) * 3 + 1) % size).view(1, -1, 1, 1).expand_as(like)


def _written(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    """A copy that something was written into."""
    y = x.clone()
    write(y)
    return y


MOVEMENT: dict[str, Op] = {
    "aten_slice": lambda x: torch.ops.aten.slice.Tensor(x, 1, 2, 5),
    "aten_select": lambda x: torch.ops.aten.select.int(x, 1, 4).unsqueeze(1),
    "hsplit": lambda x: torch.cat(torch.hsplit(x, 2)[::-1], 1),
    "hsplit_at": lambda x: torch.hsplit(x, [3, 7])[1],
    "tensor_split_at": lambda x: torch.cat(torch.tensor_split(x, (2, 5), 1)[1:], 1),
    "unsafe_split": lambda x: torch.unsafe_split(x, 3, 1)[1],
    "unsafe_chunk": lambda x: torch.cat(torch.unsafe_chunk(x, 3, 1)[::-1], 1),
    "split_with_sizes": lambda x: x.split_with_sizes([1, 3, 4], 1)[1],
    "narrow_copy": lambda x: torch.narrow_copy(x, 1, 2, 4),
    "unbound_some": lambda x: torch.stack(x.unbind(1)[2:5], 1),
    "half_by_size": lambda x: x[:, x.shape[1] // 2 :],
    "last_by_size": lambda x: x[:, x.size(1) - 3 : x.size(1) - 1],
    "written_slice": lambda x: _written(x, lambda y: y[:, 2:4].copy_(2 * x[:, 2:4])),
    "bool_mask": lambda x: x * (torch.arange(8) % 2 == 0).view(1, 8, 1, 1),
    "where_channel_mask": lambda x: torch.where((torch.arange(8) < 3).view(8, 1, 1), x, -x + 1),
    "masked_scatter": lambda x: x.masked_scatter(x > 0.5, torch.zeros_like(x)),
    "joined_with_nothing": lambda x: torch.cat([x[..., :1].repeat(1, 1, 1, 0), x], 3),
    "scatter": lambda x: x.scatter(1, torch.full_like(x[:, :1], 2, dtype=torch.int64), 0.3),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, _rotated(x), x),
    "take_along_dim": lambda x: torch.take_along_dim(x, _rotated(x), 1),
    "index_add": lambda x: x.index_add(1, torch.tensor([0, 3]), x[:, 4:6]),
    "index_copy": lambda x: x.index_copy(1, torch.tensor([1, 0]), x[:, 4:6]),
    "index_add_rows": lambda x: torch.ones_like(x).index_add(2, torch.arange(6) % 4, x),
    "index_copy_rows": lambda x: (x + 1).index_copy(3, torch.arange(6).flip(0), x),
    "scatter_rows": lambda x: x.scatter(2, x.argsort(2), 2 * x),
    "scatter_some": lambda x: x.scatter(2, x[:, :5].argsort(2), x[:, 3:]),
    "scatter_mean": lambda x: x.scatter_reduce(2, x.argsort(2) // 2, x, "mean", include_self=False),
    "index_put_rows": lambda x: x.movedim(2, 0).index_put((torch.arange(3),), x[:, :, 0] + 1)
                                 .movedim(0, 2),
    "index_put_mask": lambda x: x.index_put((x > 0.2,), torch.tensor(0.7, dtype=x.dtype)),
    "index_put_rows_mask": lambda x: x.index_put((x.mean((1, 2, 3)) > 0,),
                                                 torch.tensor(0.7, dtype=x.dtype)),
    "masked_places": lambda x: x.movedim(1, 3)[x.mean(1) > 0][..., None, None],
    "masked_places_written": lambda x: _written(x.movedim(1, 3), lambda y: y.__setitem__(
        x.mean(1) > 0, y[x.mean(1) > 0] + 1)).movedim(3, 1),
    "masked_rows_written": lambda x: _written(x, lambda y: y.__setitem__(
        x.mean((1, 2, 3)) > 0, y[x.mean((1, 2, 3)) > 0] + 1)),
    "rows_of_repeated_numbers": lambda x: x[:, :, torch.arange(3).repeat(x.shape[2], 1)].amax(3),
    "in_place_bool": lambda x: _written(x, lambda y: y.__setitem__(x < 0, -1.0)),
    "in_place_rows_of_ones": lambda x: _written(torch.ones_like(x), lambda y: y[:, :, 1:].copy_(
        x[:, :, :-1])),
    "in_place_rows_of_two": lambda x: _written(x, lambda y: y[:, :, :2].copy_(x[:, :, 2:4] + 1)),
    "in_place_rows_one_number": lambda x: _written(x, lambda y: y.__setitem__(
        (slice(None), slice(None), 1), 0.5)),
    "in_place_some_channels": lambda x: _written(x, lambda y: y.__setitem__(
        (slice(None), slice(0, 3)), 0.5)),
    "in_place_rows_read_between": lambda x: _written(x, lambda y: y[..., 0].copy_(
        (y * 2).mean(3))) * x,
    "in_place_rows_of_a_view": lambda x: _written(x, lambda y: y.flatten(2)[..., :3].copy_(
        x.flatten(2)[..., 4:7])),
    "in_place_broadcast": lambda x: _written(x, lambda y: y[:, :, 1:3].copy_(x[:1, :1, :1, :1])),
    "in_place_rounded": lambda x: _written(x, lambda y: y[:, :, 1:3].copy_(
        x[:, :, 1:3].to(torch.float16))),
    "in_place_index_add": lambda x: _written(x, lambda y: y.index_add_(2, torch.arange(6), x)),
    "index_fill": lambda x: x.index_fill(1, torch.tensor([1, 6]), 0.4),
    "index_put": lambda x: x.index_put((torch.arange(x.shape[0]),), 2 * x),
    "two_indices": lambda x: x[:, [0, 3, 5], [1, 2, 3]].unsqueeze(1),
    "bool_index": lambda x: x[:, torch.arange(8) % 3 != 0],
    "select_scatter": lambda x: x.select_scatter(x[:, 0] * 2, 1, 3),
    "slice_scatter": lambda x: x.slice_scatter(2 * x[:, 2:5], 1, 1, 4),
    "negative_slices": lambda x: torch.cat([x[:, -3:], x[:, :-3]], 1),
    "movedim": lambda x: x.movedim(1, 3).movedim(3, 1),
    "swapaxes": lambda x: x.swapaxes(1, 2).swapaxes(2, 1),
    "dropped_axis": lambda x: x[:, None, :, 0, :].transpose(1, 2).expand(-1, -1, 2, -1),
    "unfold_space": lambda x: x.unfold(2, 2, 2).flatten(3),
    "unfold_channels": lambda x: x.unfold(1, 4, 2).flatten(3),
    "as_strided": lambda x: x.contiguous().as_strided((x.shape[0], 8, 6, 6), (288, 36, 6, 1)),
    "diagonal": lambda x: x.diagonal(0, 1, 2).unsqueeze(1),
    "in_place_slice": lambda x: _written(x, lambda y: y[:, :3].mul_(2)),
    "in_place_zero": lambda x: _written(x, lambda y: y[:, 2].zero_()),
    "in_place_fill": lambda x: _written(x, lambda y: y.view(-1, 2, 4, 6, 6)[:, 1].fill_(0.3)),
    "in_place_add_half": lambda x: _written(x, lambda y: y[:, ::2].add_(y[:, 1::2])),
    "in_place_masked": lambda x: _written(x, lambda y: y.masked_fill_(y > 0.2, 0.1)),
    "in_place_clamp": lambda x: _written(x, lambda y: y.clamp_(min=0.1)),
    "in_place_copy": lambda x: _written(x, lambda y: y[:, 5:].copy_(x[:, :3])),
    "in_place_sigmoid": lambda x: _written(x, lambda y: y.sigmoid_()),
    "in_place_detached": lambda x: _written(x, lambda y: y.detach().add_(1.0)),
    "in_place_item": lambda x: _written(x, lambda y: y.__setitem__((slice(None), 1), 0.7)),
    "in_place_transposed": lambda x: _written(x, lambda y: y.transpose(1, 2)[:, 0].add_(1)),
    "in_place_scatter": lambda x: _written(x, lambda y: y.scatter_(1, _rotated(y)[:, :1], 0.3)),
}  # fmt: skip
