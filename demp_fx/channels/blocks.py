"""Labels on several dims: one axis split into nested blocks, such as heads and their channels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from demp_fx.channels.labels import varying
from demp_fx.channels.runs import Mask

Atoms = npt.NDArray[np.int64]  # numpy looks at small arrays several times faster than torch


def nested(label: Tensor) -> Tensor | None:
    """The atoms of a label arranged as nested blocks (n1, ..., nk), outermost axis first.

    That is possible where a label is base + f1(i1) + ... + fk(ik) with every f increasing, and each
    step of an outer one larger than all inner ones together: what splitting, permuting, slicing
    and merging in order make of an axis of consecutive atoms. Repetitions along a dim (a merged
    batch, say) are left out. None where there is no such arrangement.
    """
    flat = label.squeeze().numpy()
    if flat.ndim == 0:
        return None
    base = int(flat.item(0))
    total, lines = np.full((1,) * flat.ndim, base), []
    for d in range(flat.ndim):
        line = _line(flat, d) - base
        total = total + line.reshape([-1 if k == d else 1 for k in range(flat.ndim)])
        lines.append(without_repeats(line))
    if not np.array_equal(total, flat):
        return None
    reach, atoms = 0, np.array(base)
    for line in sorted(lines, key=lambda f: int(f[1]) if len(f) > 1 else 0):
        if line.size == 1 or int((line[1:] - line[:-1]).min()) <= reach:
            return None
        reach += int(line[-1])
        atoms = line.reshape(-1, *[1] * atoms.ndim) + atoms
    return torch.from_numpy(atoms)


def _line(atoms: Atoms, dim: int) -> Atoms:
    """The atoms along a dim, at the first index of all others."""
    return atoms[tuple(slice(None) if d == dim else 0 for d in range(atoms.ndim))]


def without_repeats(line: Atoms) -> Atoms:
    """One period of a line that repeats each entry, or itself as a whole, or both."""
    new = np.empty(line.size, dtype=bool)
    new[:1] = True
    np.not_equal(line[1:], line[:-1], out=new[1:])
    short = line[new]
    times = line.size // short.size
    if times > 1 and not np.array_equal(short.repeat(times), line):
        return line
    again = (short[1:] == short[0]).nonzero()[0]
    period = int(again[0]) + 1 if again.size else short.size
    first = short[:period]
    if short.size % period or not np.array_equal(np.tile(first, short.size // period), short):
        return line
    return first


def repeats_along(label: Tensor, dim: int) -> bool:
    """Whether the atoms along a dim repeat themselves: it is merged with another one."""
    line = _line(label.numpy(), dim)
    return without_repeats(line).size < line.size


def recurs_along(label: Tensor, dim: int) -> bool:
    """Whether an atom is at several places along a dim: so it is where that is merged with another
    one, or with a part of that."""
    line = _line(label.numpy(), dim)
    return np.unique(line).size < line.size


def outer_to_inner(label: Tensor) -> list[int]:
    """The varying dims of a label, the one with the largest step first."""
    dims, atoms = varying(label), label.numpy()
    if len(dims) < 2:
        return list(dims)

    def step(d: int) -> int:
        line = _line(atoms, d)
        moves = line[line != line[0]] - line[0]
        return int(np.abs(moves).min()) if moves.size else 0

    return sorted(dims, key=step, reverse=True)


def rows_of(label: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A label (or mask) as a matrix: its indices on `dims` by all others that vary."""
    rest = [d for d in range(label.dim()) if d not in dims]
    size = 1
    for d in dims:
        size *= label.size(d)
    return label.permute(*dims, *rest).reshape(size, -1)


def fillers(present: Mask) -> Mask:
    """Which entries of nested blocks (n1, ..., nk) must be added, so that blocks are equal again.

    Blocks without any entry may go; all others of a level become as long as the longest.
    """
    if present.ndim < 2:
        return np.zeros_like(present)
    full = present.copy()
    alive: Mask = np.asarray(full.any(-1))
    full[..., 0] |= fillers(alive)
    counts = full.sum(-1, keepdims=True)
    missing = np.where(counts > 0, counts.max() - counts, 0)
    if missing.any():
        absent = ~full
        full |= absent & (absent.cumsum(-1) <= missing)
    filled: Mask = full & ~present
    return filled


def dim_masks(kept: Tensor, order: list[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]] | None:
    """Which indices of each dim stay, of a label whose survivors are `kept`.

    `order`: its varying dims, outer ones first. In inner dims other indices may stay in each block;
    then the mask is that of the first block, and all blocks' masks are returned second. None where
    the blocks are not equally long.
    """
    masks: dict[int, Tensor] = {}
    ragged: dict[int, Tensor] = {}
    rest = [d for d in range(kept.dim()) if d not in order]
    blocks = kept.numpy().transpose(*order, *rest).reshape(1, *[kept.size(d) for d in order])
    for d in order:
        if not blocks.shape[0]:  # nothing is left to be in blocks
            return None
        alive = np.asarray(blocks.any(tuple(range(2, blocks.ndim))))
        counts = alive.sum(1)
        if counts.min() != counts.max():
            return None
        masks[d] = torch.from_numpy(alive[0])
        if not (alive == alive[0]).all():
            ragged[d] = torch.from_numpy(alive)
        blocks = blocks[alive]
    return masks, ragged
