"""Plain layers: what they give on meta and how many multiplications that takes, without a look at
their ops. Enough where only shapes are wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from demp_fx.shapes import convolution

Given = tuple[Tensor, int]  # the result on meta, and the multiplications


def given(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
    """What a layer gives; None where its own code has to say that (also what is wrong)."""
    plain = _LAYERS.get(type(layer))
    if plain is None or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or not args[0].is_floating_point():
        return None
    with suppress(RuntimeError):
        return plain(layer, args[0])
    return None


def _same(_: Any, x: Tensor) -> Given:
    return x, 0


def _batch_norm(layer: Any, x: Tensor) -> Given | None:
    state = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    fits = x.dim() > 1 and all(t is None or t.numel() == x.size(1) for t in state)
    return (x, 0) if fits else None


def _linear(layer: nn.Linear, x: Tensor) -> Given | None:
    rows, columns = layer.weight.shape
    if x.dim() == 0 or x.size(-1) != columns or x.dtype != layer.weight.dtype:
        return None
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device="meta")
    return out, out.numel() * columns


def _convolution(layer: Any, x: Tensor) -> Given | None:
    weight = layer.weight
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not plain or x.dim() != weight.dim() or x.dtype != weight.dtype:
        return None
    out = convolution((x, weight, layer.bias, layer.stride, layer.padding, layer.dilation,
                       False, (), layer.groups))  # fmt: skip
    return out, out.numel() * weight[0].numel()


_LAYERS: dict[type[nn.Module], Callable[[Any, Tensor], Given | None]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys(
        (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU,
         nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Softmax),
        _same,
    ),
    nn.Linear: _linear,
}  # fmt: skip
