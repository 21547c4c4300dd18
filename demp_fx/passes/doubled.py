"""Float64: a mode in which every op computes in it, without a copy of all weights in it.

Weights are converted where an op computes with them; large ones a part at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Numbers of a weight that are converted at once: 32 MiB, which malloc takes from the system and
# gives back at once, while smaller pieces leave holes that the next ones may not fit into.
PART = 1 << 22
# Products with a weight: which argument that is, and its dim of outputs (dim 1 of the result).
PRODUCTS = {aten.mm.default: (1, 1), aten.addmm.default: (2, 1), aten.convolution.default: (1, 0)}


class InFloat64(TorchDispatchMode):
    """Every float is float64, also where code asks for another dtype (norms that always compute in
    float32, grids of coordinates): rounding magnifies differences in the last digit.

    Raises `RuntimeError` where something is written into one of `weights`.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {weight.untyped_storage()._cdata for weight in weights}
        self.default = torch.get_default_dtype()

    def __enter__(self) -> Self:
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.default)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype")
        if dtype is not None and dtype.is_floating_point:
            kwargs["dtype"] = torch.float64
        if func is aten.embedding.default:  # of the rows that it takes
            return _double(func(*args, **kwargs))
        if _is_large(func, args):
            return _in_parts(func, args, kwargs)
        names, shared = _arguments(func)
        args = tuple(self._given(a, shared.get(n)) for n, a in zip(names, args, strict=False))
        kwargs = {n: self._given(a, shared.get(n)) for n, a in kwargs.items()}
        return func(*args, **kwargs)

    def _given(self, argument: Any, written: bool | None) -> Any:
        """An argument in float64; as it is where the result is a view of it or it is `written`."""
        if written is None:
            return _double(argument)
        if written and pytree.tree_any_only(Tensor, self._is_weight, argument):
            raise RuntimeError("a weight would be changed")
        return argument

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.weights


@functools.cache
def _arguments(func: Any) -> tuple[list[str], dict[str, bool]]:
    """The names of an op's arguments; those that results share memory with: whether written."""
    given = func._schema.arguments
    shared = {a.name: a.alias_info.is_write for a in given if a.alias_info is not None}
    return [a.name for a in given], shared


def _double(tree: Any) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(torch.float64) if t.is_floating_point() else t, tree
    )


def _is_large(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an op is a product with a large weight that can be computed in parts."""
    if func not in PRODUCTS:
        return False
    weight: Tensor = args[PRODUCTS[func][0]]
    if func is aten.addmm.default and args[0].dim() != 1:
        return False
    if func is aten.convolution.default and (args[6] or args[8] != 1):  # transposed or grouped
        return False
    return weight.dtype != torch.float64 and weight.numel() > PART


def _in_parts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A product with a weight, for some of its outputs at a time."""
    place, dim = PRODUCTS[func]
    size = args[place].size(dim)
    step = math.ceil(PART * size / args[place].numel())
    found = []
    for start in range(0, size, step):
        some = start, min(step, size - start)
        part = [a.narrow(0, *some) if isinstance(a, Tensor) and a.dim() == 1 else a for a in args]
        part[place] = args[place].narrow(dim, *some)
        found.append(func(*_double(part), **kwargs))
    return torch.cat(found, 1)
