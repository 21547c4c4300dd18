"""Labels: which atoms the elements of a tensor carry.

A label of a tensor of rank r is an int64 tensor of rank r, of size 1 along the dims where it does
not vary. A tensor has a tuple of them; an element survives iff all of its atoms do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Labels = tuple[Tensor, ...]


def varying(label: Tensor) -> tuple[int, ...]:
    """The dims along which a label varies."""
    return tuple([d for d, n in enumerate(label.shape) if n > 1])  # a list: asked very often


def compress(label: Tensor) -> Tensor:
    """Size 1 along every dim where nothing varies. Strides are asked before values."""
    for d in range(label.dim()):
        if label.size(d) > 1:
            first = label.narrow(d, 0, 1)
            if label.stride(d) == 0 or bool((label == first).all()):
                label = first
    return label


def same_label(a: Tensor, b: Tensor) -> bool:
    """Whether two labels are the same."""
    return a is b or (a.shape == b.shape and bool((a == b).all()))


def repeats(label: Tensor) -> bool:
    """Whether channels are merged with another axis: where they are then depends on its size."""
    atoms = label.reshape(-1).numpy()
    return not (atoms[1:] > atoms[:-1]).all() and np.unique(atoms).size < atoms.size


def beside(pieces: Sequence[Tensor], sizes: Sequence[int], dim: int) -> Tensor:
    """What broadcasts to tensors of these `sizes` along `dim`, for all of them in a row."""
    shape = [max(p.size(d) for p in pieces) for d in range(pieces[0].dim())]
    full = [
        p.expand(*shape[:dim], n, *shape[dim + 1 :]) for p, n in zip(pieces, sizes, strict=True)
    ]
    return torch.cat(full, dim)


def along(atoms: Tensor, rank: int, dim: int) -> Tensor:
    """A label that carries `atoms` on `dim`."""
    shape = [1] * rank
    shape[dim] = -1
    return atoms.reshape(shape)


def reshaped(label: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """A label of a tensor of shape `old`, when that is reshaped to `new`.

    Both shapes are taken apart into runs of dims of equal extent; only those on which the label
    varies are written out. Where there are no numbers, there are labels as for one.
    """
    old, new = ([max(n, 1) for n in sizes] for sizes in (old, new))
    full, shape, i, j = list(label.shape), [], 0, 0
    while i < len(old) or j < len(new):
        start, begin, left, right = i, j, 1, 1
        while i == start or j == begin or left != right:
            if j == len(new) or (i < len(old) and left <= right):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
            if i == len(old) and j == len(new):
                break
        varies = any(label.size(d) > 1 for d in range(start, i))
        if varies:
            full[start:i] = old[start:i]
        shape += list(new[begin:j]) if varies else [1] * (j - begin)
    return label.expand(full).reshape(shape)


def moved(label: Tensor, dims: dict[int, int], rank: int) -> Tensor | None:
    """The label with each varying dim d moved to dims[d], or None where one has no image."""
    if any(d not in dims for d in varying(label)):
        return None
    shape = [1] * rank
    order = sorted(varying(label), key=lambda d: dims[d])
    for d in order:
        shape[dims[d]] = label.size(d)
    kept = label.squeeze() if label.dim() else label
    if len(order) > 1:
        position = {d: k for k, d in enumerate(varying(label))}
        kept = kept.permute([position[d] for d in order])
    return kept.reshape(shape)
