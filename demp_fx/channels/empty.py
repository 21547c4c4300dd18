"""Which slices of a weight are all zero, with as little reading as possible.

A dense weight costs a look at two numbers of each slice. Where many slices could be empty, the
whole is read once for both dims that channels lie on: large weights do not fit a cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FEW = 16  # fewer slices than one in so many are picked out, more are read with the whole
BLOCK = 1 << 20  # bytes of a weight that are looked at in both ways while they are at hand
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Bits = npt.NDArray[np.signedinteger]


class Empty:
    """The empty slices of one weight, remembered."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._found: dict[int, Tensor] = {}

    def along(self, dim: int) -> Tensor | None:
        """Which slices along `dim` are all zero; None where none is."""
        weight = self.weight
        if weight.is_meta or weight.numel() == 0 or weight.layout is not torch.strided:
            return None
        dim %= weight.dim()
        if dim not in self._found:
            self._find(dim)
        empty = self._found[dim]
        return empty if bool(empty.any()) else None

    def _find(self, dim: int) -> None:
        weight = self.weight
        for d, stride in enumerate(weight.stride()):
            if stride == 0 and d != dim:  # expanded: the same numbers again
                weight = weight.narrow(d, 0, 1)
        blank = _blank_ends(weight, dim)
        index = blank.nonzero().reshape(-1)
        if index.numel() * FEW > blank.numel() and weight.is_cpu and weight.is_floating_point():
            dims = {dim, *range(min(2, weight.dim()))} if weight is self.weight else {dim}
            self._found |= _scan(weight, sorted(dims))
            return
        if index.numel():
            picked = weight.index_select(dim, index)
            blank[index] = ~(picked != 0).movedim(dim, 0).reshape(len(index), -1).any(1)
        self._found[dim] = blank.cpu()


def _blank_ends(weight: Tensor, dim: int) -> Tensor:
    """The slices whose first and last number are zero."""
    slices = weight.movedim(dim, 0)
    blank = torch.ones(slices.size(0), dtype=torch.bool, device=weight.device)
    for end in (0, -1):
        corner = slices
        while corner.dim() > 1:
            corner = corner.select(1, end)
        blank &= corner == 0
    return blank


def _scan(weight: Tensor, dims: list[int]) -> dict[int, Tensor]:
    """The slices along each of `dims` that have no bit set but signs: numpy's bitwise or is several
    times faster than torch's reductions over strided dims."""
    bits: Bits = weight.view(_BITS[weight.element_size()]).numpy()
    found = {d: np.zeros(weight.size(d), dtype=bits.dtype) for d in dims}
    step = max(1, BLOCK * len(bits) // max(1, bits.nbytes))
    for start in range(0, len(bits), step):
        part = bits[start : start + step]
        for d, seen in found.items():
            here = seen[start : start + step] if d == 0 else seen
            here |= _joined(part, d, weight.stride())
    return {d: torch.from_numpy((seen << 1) == 0) for d, seen in found.items()}


def _joined(bits: Bits, dim: int, strides: tuple[int, ...]) -> Bits:
    """All bits that are set anywhere in each slice along `dim`; outer axes are reduced first."""
    outer = [d for d, stride in enumerate(strides) if stride > strides[dim]]
    inner = [d for d in range(bits.ndim) if d not in (*outer, dim)]
    for axes in filter(None, (outer, inner)):  # over no axis at all it would be copied
        bits = np.bitwise_or.reduce(bits, axis=tuple(axes), keepdims=True)
    return bits.reshape(-1)
