"""Shapes of results, by shortcuts past slow kernels: what torch gives on meta tensors, through
decompositions in Python, takes up to a millisecond an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
ALIGNED = 16  # bytes: the kernel of rows times one of several matrices takes no other strides
Shape = Callable[[tuple[Any, ...]], Any]  # the arguments of an op -> its result, on meta


def _twin(x: Tensor) -> Tensor:
    """A tensor of the same sizes and dtype, and strides unless there are gaps, as elementwise ops
    give it, on meta (`empty_like` takes ten times longer there)."""
    if not x.is_contiguous() and not _is_dense(x):
        return torch.empty_like(x, device="meta")
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order of dims."""
    size = 1
    for stride, extent in sorted(zip(x.stride(), x.shape, strict=True)):
        if extent != 1 and stride != size:
            return False
        size *= extent
    return True


def _is_in_place(op: torch._ops.OpOverload) -> bool:
    """Whether an op writes to its first operand."""
    alias = op._schema.arguments[0].alias_info
    return alias is not None and bool(alias.is_write)


def _first(op: torch._ops.OpOverload) -> Shape:
    """The shape of an op whose result is like its operand, or is its operand."""
    if _is_in_place(op):
        return lambda args: args[0]
    return lambda args: _twin(args[0]) if args[0].is_floating_point() else op(*args)


def _softmax(op: torch._ops.OpOverload) -> Shape:
    """The shape of a softmax, unless it gives another dtype or order of dims."""

    def shape(args: tuple[Any, ...]) -> Any:
        plain = args[0].is_contiguous() and not any(args[2:])
        return _twin(args[0]) if plain else op(*args)

    return shape


def _alike(op: torch._ops.OpOverload) -> Shape:
    """The shape of an op on two operands of one dtype that fit, or on one and a number."""
    in_place = _is_in_place(op)

    def shape(args: tuple[Any, ...]) -> Any:
        x, y = args[0], args[1]
        if isinstance(x, Tensor) and x.is_floating_point():
            if isinstance(y, (int, float)):
                return x if in_place else _twin(x)
            if isinstance(y, Tensor) and x.dtype == y.dtype:
                if x.shape == y.shape:
                    return x if in_place else _twin(x)
                sizes = _broadcast(x, y)
                if in_place and sizes == tuple(x.shape):
                    return x
                if sizes is not None and not in_place:
                    return torch.empty(sizes, dtype=x.dtype, device="meta")
        return op(*args)

    return shape


def _broadcast(x: Tensor, y: Tensor) -> tuple[int, ...] | None:
    """The sizes of an elementwise result; None where they do not fit, or where its memory may be
    laid out in another order."""
    if not (x.is_contiguous() and y.is_contiguous()):
        return None
    short, long = sorted((tuple(x.shape), tuple(y.shape)), key=len)
    short = (1,) * (len(long) - len(short)) + short
    if any(m != n and 1 not in (m, n) for m, n in zip(short, long, strict=True)):
        return None
    return tuple(max(m, n) if 0 not in (m, n) else 0 for m, n in zip(short, long, strict=True))


def _product(op: torch._ops.OpOverload, left: int) -> Shape:
    """The shape of a matrix product whose left operand is argument `left`."""

    def shape(args: tuple[object, ...]) -> Tensor:
        a, b = args[left : left + 2]
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        if a.size(-1) != b.size(-2) or a.dtype != b.dtype:
            result: Tensor = op(*args)  # let torch say what is wrong
            return result
        return torch.empty((*a.shape[:-1], b.size(-1)), dtype=a.dtype, device="meta")

    return shape


def _grouped_product(args: tuple[Any, ...]) -> Tensor:
    """Rows, each multiplied with one of several matrices: torch knows no float32 of it on meta."""
    x, weights = args[:2]
    if x.dim() != 2 or weights.dim() != 3 or x.size(1) != weights.size(1):
        raise RuntimeError(f"no rows for {tuple(weights.shape)} matrices: {tuple(x.shape)}")
    if any(n * x.element_size() % ALIGNED for n in weights.shape[1:]):
        raise RuntimeError(f"strides should be multiples of {ALIGNED} bytes")
    return torch.empty((x.size(0), weights.size(2)), dtype=x.dtype, device="meta")


def _cat(args: tuple[Any, ...]) -> Tensor:
    """The sizes of a join, without the long way through its decomposition."""
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    first = tensors[0]
    rest = [t.shape[:dim] + t.shape[dim:][1:] for t in tensors] if dim >= 0 else []
    if any(r != rest[0] or t.dtype != first.dtype for r, t in zip(rest, tensors, strict=False)):
        rest = []
    if not rest or not all(t.is_meta and t.is_contiguous() for t in tensors):
        result: Tensor = torch.ops.aten.cat.default(*args)
        return result
    shape = list(first.shape)
    shape[dim] = sum(t.size(dim) for t in tensors)
    return torch.empty(shape, dtype=first.dtype, device="meta")


def convolution(args: tuple[Any, ...]) -> Tensor:
    """The shape of `aten.convolution`, by torch's own formula: without its checks of the device and
    of memory formats."""
    x, weight, _, stride, padding, dilation, transposed, _, groups = args
    dims = x.dim() - 2
    space = [
        (n + 2 * pad - gap * (k - 1) - 1) // step + 1
        for n, k, step, pad, gap in zip(
            x.shape[2:], weight.shape[2:], each(stride, dims), each(padding, dims),
            each(dilation, dims), strict=True,
        )
    ]  # fmt: skip
    fits = x.size(1) == weight.size(1) * groups and min(space) > 0
    shape = (x.size(0), weight.size(0), *space)
    if transposed or not fits or not x.is_contiguous():
        shape = aten.convolution.default(*args).shape  # or let torch say what is wrong
    return torch.empty(shape, dtype=x.dtype, device="meta")


def each(setting: int | list[int], count: int) -> list[int]:
    """A setting for each of `count` dims: it may be one for all."""
    numbers = [setting] if isinstance(setting, int) else setting
    return numbers * count if len(numbers) == 1 else numbers


def _batch_norm(args: tuple[Any, ...]) -> Any:
    x = args[0]
    if any(t is not None and t.numel() != x.size(1) for t in args[1:5]):
        return aten.native_batch_norm.default(*args)  # torch says what is wrong
    return _twin(x), _NONE, _NONE


def _layer_norm(args: tuple[Any, ...]) -> Any:
    x, shape = args[:2]
    if list(x.shape[x.dim() - len(shape) :]) != list(shape):
        return aten.native_layer_norm.default(*args)  # torch says what is wrong
    return torch.empty(x.shape, dtype=x.dtype, device="meta"), _NONE, _NONE


def _reduced(op: torch._ops.OpOverload) -> Shape:
    """The shape of a sum or mean over some dims."""

    def shape(args: tuple[Any, ...]) -> Tensor:
        x, dims, keeps = args[0], args[1], len(args) > 2 and args[2]
        plain = dims and x.dim() and x.is_floating_point() and x.is_contiguous()
        over = {d % x.dim() for d in dims} if plain else set()
        if not plain or len(over) != len(dims) or not all(-x.dim() <= d < x.dim() for d in dims):
            result: Tensor = op(*args)
            return result
        sizes = [1 if d in over else n for d, n in enumerate(x.shape) if keeps or d not in over]
        return torch.empty(sizes, dtype=x.dtype, device="meta")

    return shape


_NONE = torch.empty(0, device="meta")

SHAPES: dict[torch._ops.OpOverload, Shape] = {
    **{
        op: _first(op)
        for op in (
            aten.gelu.default, aten.hardswish.default, aten.hardsigmoid.default,
            aten.hardtanh.default, aten.silu.default, aten.elu.default, aten.leaky_relu.default,
            aten.mish.default, aten.softplus.default, aten.hardtanh_.default,
            aten.hardswish_.default, aten.silu_.default, aten.elu_.default,
            aten.hardsigmoid_.default,
            aten.leaky_relu_.default, aten.relu_.default, aten.relu.default,
            aten.sigmoid.default, aten.tanh.default, aten.neg.default, aten.exp.default,
            aten.sqrt.default, aten.rsqrt.default, aten.sin.default, aten.cos.default,
            aten.clamp_min.default, aten.pow.Tensor_Scalar,
        )
    },
    **{
        op: _softmax(op)
        for op in (aten._softmax.default, aten._safe_softmax.default, aten._log_softmax.default)
    },
    **{
        op: _alike(op)
        for op in (
            aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul_.Tensor,
            aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar,
        )
    },
    **{
        op: _product(op, left)
        for op, left in ((aten.addmm.default, 1), (aten.mm.default, 0), (aten.bmm.default, 0))
    },
    **{op: _reduced(op) for op in (aten.mean.dim, aten.sum.dim_IntList)},
    aten.cat.default: _cat,
    aten.convolution.default: convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
}  # fmt: skip
# Of these, arguments by name change nothing about the shape.
_OPTIONS: set[Any] = {aten._grouped_mm.default} if hasattr(aten, "_grouped_mm") else set()
SHAPES |= dict.fromkeys(_OPTIONS, _grouped_product)


def shape_of(
    op: Any, shapes: Mapping[Any, Shape], kwargs: Mapping[str, Any] | None
) -> Shape | None:
    """The shortcut for a call of an op, if there is one."""
    return shapes.get(op) if not kwargs or op in _OPTIONS else None
