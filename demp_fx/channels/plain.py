"""Plain layers: which ATen op one is a call of, and what that gives on meta. The long way there,
through torch's module, function and dispatcher, takes as long as a rule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from demp_fx.shapes import SHAPES, convolution

aten = torch.ops.aten


@dataclass(slots=True)
class Plain:
    """A call of one op, which gives `out` by `macs` multiplications; of none, if `op` is None."""

    op: torch._ops.OpOverload | None
    args: tuple[Any, ...]
    out: Tensor
    macs: int = 0
    kwargs: dict[str, Any] = field(default_factory=dict)


def call_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plain | None:
    """What a call of a layer in eval mode is; None where its own code has to say that (also what
    is wrong)."""
    plain = _LAYERS.get(type(layer))
    if plain is None or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return None
    if not args[0].is_floating_point() or not args[0].is_meta:
        return None
    with suppress(RuntimeError):
        return plain(layer, args[0])
    return None


def _same(_: Any, x: Tensor) -> Plain:
    return Plain(None, (x,), x)


def _elementwise(
    op: torch._ops.OpOverload, in_place: torch._ops.OpOverload | None = None, *settings: str
) -> Callable[[Any, Tensor], Plain]:
    """A layer that is an elementwise op of its input and these of its attributes."""

    def plain(layer: Any, x: Tensor) -> Plain:
        chosen = in_place if in_place is not None and layer.inplace else op
        args = (x, *(getattr(layer, name) for name in settings))
        return Plain(chosen, args, SHAPES[chosen](args))

    return plain


def _gelu(layer: nn.GELU, x: Tensor) -> Plain:
    named = {"approximate": layer.approximate}
    return Plain(aten.gelu.default, (x,), SHAPES[aten.gelu.default]((x,)), kwargs=named)


def _softmax(layer: nn.Softmax, x: Tensor) -> Plain | None:
    if layer.dim is None or not -x.dim() <= layer.dim < x.dim():
        return None
    args = (x, layer.dim, False)
    return Plain(aten._softmax.default, args, SHAPES[aten._softmax.default](args))


def _batch_norm(layer: Any, x: Tensor) -> Plain | None:
    state = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    if x.dim() < 2 or layer.running_mean is None:
        return None
    if any(t is not None and t.numel() != x.size(1) for t in state):
        return None
    args = (x, *state, False, layer.momentum or 0.0, layer.eps)
    out, *_ = SHAPES[aten.native_batch_norm.default](args)
    return Plain(aten.native_batch_norm.default, args, out)


def _layer_norm(layer: nn.LayerNorm, x: Tensor) -> Plain | None:
    shape = layer.normalized_shape
    if tuple(x.shape[x.dim() - len(shape) :]) != tuple(shape):
        return None
    args = (x, shape, layer.weight, layer.bias, layer.eps)
    out, *_ = SHAPES[aten.native_layer_norm.default](args)
    return Plain(aten.native_layer_norm.default, args, out)


def _linear(layer: nn.Linear, x: Tensor) -> Plain | None:
    rows, columns = layer.weight.shape
    if x.dim() == 0 or x.size(-1) != columns or x.dtype != layer.weight.dtype:
        return None
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device="meta")
    args = (x, layer.weight, layer.bias)
    return Plain(aten.linear.default, args, out, out.numel() * columns)


def _convolution(layer: Any, x: Tensor) -> Plain | None:
    weight = layer.weight
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not plain or x.dim() != weight.dim() or x.dtype != weight.dtype:
        return None
    none = (0,) * len(layer.stride)
    args = (x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, False, none,
            layer.groups)  # fmt: skip
    out = convolution(args)
    return Plain(aten.convolution.default, args, out, out.numel() * weight[0].numel())


_LAYERS: dict[type[nn.Module], Callable[[Any, Tensor], Plain | None]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d), _same),
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.Softmax: _softmax,
    nn.GELU: _gelu,
    nn.ReLU: _elementwise(aten.relu.default, aten.relu_.default),
    nn.SiLU: _elementwise(aten.silu.default, aten.silu_.default),
    nn.Hardswish: _elementwise(aten.hardswish.default, aten.hardswish_.default),
    nn.ReLU6: _elementwise(
        aten.hardtanh.default, aten.hardtanh_.default, "min_val", "max_val"
    ),
    nn.LeakyReLU: _elementwise(
        aten.leaky_relu.default, aten.leaky_relu_.default, "negative_slope"
    ),
    nn.ELU: _elementwise(aten.elu.default, aten.elu_.default, "alpha"),
    nn.Sigmoid: _elementwise(aten.sigmoid.default),
    nn.Tanh: _elementwise(aten.tanh.default),
    nn.Hardsigmoid: _elementwise(aten.hardsigmoid.default, aten.hardsigmoid_.default),
}  # fmt: skip
