"""Many vectors of atoms laid end to end, so that all of them are asked about at once.

In numpy, which indexes small arrays several times faster than torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Runs:
    """Vectors of atoms, translated by a table (to the classes that they are in, say).

    `at`: all of them; `ends`: where each ends there, behind a leading zero.
    """

    def __init__(self, parts: Sequence[Tensor], table: Indices) -> None:
        self.ends = np.cumsum([0, *(part.numel() for part in parts)])
        flat = [part.reshape(-1) for part in parts] or [torch.zeros(0, dtype=torch.int64)]
        self.at: Indices = table[torch.cat(flat).numpy()]

    def counts(self, mask: Mask) -> Indices:
        """How many entries of each vector are True in a mask over what the table gives."""
        return self.within(mask[self.at])

    def within(self, mask: Mask) -> Indices:
        """How many entries of each vector are True in a mask over `at`."""
        return np.diff(np.searchsorted(np.flatnonzero(mask), self.ends))

    def part(self, k: int) -> Indices:
        """One of the vectors, translated."""
        return self.at[self.ends[k] : self.ends[k + 1]]

    def split(self, values: Indices) -> list[Indices]:
        """Values that stand at the entries of `at`, as one vector for each of the parts."""
        ends = self.ends.tolist()
        return [values[a:b] for a, b in itertools.pairwise(ends)]
