"""What is written in place, and what a tensor holds afterwards that shares the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts

aten = torch.ops.aten


@dataclass(slots=True, eq=False)
class Write:
    """What an op wrote into a tensor: one number everywhere, or anything (None)."""

    tensor: Tensor
    number: float | None

    @classmethod
    def by(cls, op: Any, args: tuple[Any, ...], tensor: Tensor) -> Write:
        """What a call of `op` writes to `tensor`."""
        if op is aten.zero_.default:
            return cls(tensor, 0.0)
        return cls(tensor, float(args[1]) if op is aten.fill_.Scalar else None)


def filled(facts: Facts | None, tensor: Tensor, writes: Sequence[Write]) -> Facts | None:
    """What is known of a vector after numbers were written into its memory (None: nothing, as of a
    tensor with more dims)."""
    if tensor.dim() != 1:
        return None
    size = tensor.numel()
    known, profile = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.int64)
    values = torch.zeros(2, size, dtype=torch.float64)
    if facts is not None:
        known, values, profile = facts.known | known, facts.values + values, facts.profile | profile
    here = _places(tensor)
    for write in writes:
        inside = torch.isin(here, _places(write.tensor).reshape(-1))
        known, profile = known | inside, profile.masked_fill(inside, 0)
        values = values.masked_fill(inside, write.number or 0.0)
    return Facts.of(known, values) if not profile.any() else Facts(known, values, profile)


def _places(tensor: Tensor) -> Tensor:
    """For each element of a tensor its place in the storage."""
    storage = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    return storage.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
