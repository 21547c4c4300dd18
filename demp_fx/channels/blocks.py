"""Labels on several dims: one axis split into nested blocks, such as heads and their channels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from demp_fx.channels.labels import varying
from demp_fx.channels.runs import Mask


def nested(label: Tensor) -> Tensor | None:
    """The atoms of a label arranged as nested blocks (n1, ..., nk), outermost axis first.

    That is possible where a label is base + f1(i1) + ... + fk(ik) with every f increasing, and each
    step of an outer one larger than all inner ones together: what splitting, permuting, slicing
    and merging in order make of an axis of consecutive atoms. Repetitions along a dim (a merged
    batch, say) are left out. None where there is no such arrangement.
    """
    flat = label.squeeze()
    if flat.dim() == 0:
        return None
    base = int(flat[(0,) * flat.dim()])
    total, lines = torch.full((1,) * flat.dim(), base), []
    for d in range(flat.dim()):
        line = flat.movedim(d, 0).reshape(flat.size(d), -1)[:, 0] - base
        total = total + line.reshape([-1 if k == d else 1 for k in range(flat.dim())])
        lines.append(without_repeats(line))
    if not torch.equal(total, flat):
        return None
    reach, atoms = 0, torch.tensor(base)
    for line in sorted(lines, key=lambda f: int(f[1]) if len(f) > 1 else 0):
        if line.numel() == 1 or int(line.diff().min()) <= reach:
            return None
        reach += int(line[-1])
        atoms = line.reshape(-1, *[1] * atoms.dim()) + atoms
    return atoms


def without_repeats(line: Tensor) -> Tensor:
    """One period of a line that repeats each entry, or itself as a whole, or both."""
    short = line.unique_consecutive()
    times = line.numel() // short.numel()
    if times > 1 and not torch.equal(short.repeat_interleave(times), line):
        return line
    again = (short[1:] == short[0]).nonzero()
    period = int(again[0]) + 1 if again.numel() else short.numel()
    first: Tensor = short[:period]
    if short.numel() % period or not torch.equal(first.repeat(short.numel() // period), short):
        return line
    return first


def repeats_along(label: Tensor, dim: int) -> bool:
    """Whether the atoms along a dim repeat themselves: it is merged with another one."""
    line = label.movedim(dim, 0).reshape(label.size(dim), -1)[:, 0]
    return without_repeats(line - line[0]).numel() < line.numel()


def outer_to_inner(label: Tensor) -> list[int]:
    """The varying dims of a label, the one with the largest step first."""
    atoms = label.numpy()

    def step(d: int) -> int:
        line = atoms[tuple(slice(None) if k == d else 0 for k in range(atoms.ndim))]
        moves = np.abs(line[line != line[0]] - line[0])
        return int(moves.min()) if moves.size else 0

    return sorted(varying(label), key=step, reverse=True)


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
