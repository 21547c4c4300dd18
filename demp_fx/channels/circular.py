"""Circular padding as what it is: the ends of an axis, joined on at the other side of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def circular_in_parts() -> Iterator[None]:
    """Meanwhile circular padding is made of slices and joins: torch itself writes into new memory,
    of which nobody can tell that all of it is written."""
    namespace: Any = torch._C._nn
    built_in = namespace.pad

    def pad(x: Tensor, sizes: Sequence[int], mode: str = "constant", value: Any = None) -> Tensor:
        if mode != "circular" or min(sizes) < 0:
            padded: Tensor = built_in(x, sizes, mode, value)
            return padded
        for k, (left, right) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
            dim = x.dim() - 1 - k
            ends = x.narrow(dim, x.size(dim) - left, left), x.narrow(dim, 0, right)
            x = torch.cat([t for t in (ends[0], x, ends[1]) if t.size(dim)], dim)
        return x

    namespace.pad = pad
    try:
        yield
    finally:
        namespace.pad = built_in
