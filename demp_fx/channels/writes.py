"""What is written in place, and what a tensor holds afterwards that shares the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, varying

aten = torch.ops.aten


def memory_of(tensor: Tensor) -> int:
    """What tells whether tensors share memory; sparse ones have none to share."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


@dataclass(slots=True, eq=False)
class Write:
    """What an op wrote into a tensor: one number everywhere, or anything (None).

    `labels`: those of the tensor, if it has them as before: each channel was written into itself.
    `facts`: what is known of the tensor now.
    """

    tensor: Tensor
    number: float | None
    labels: Labels = ()
    facts: Facts | None = None

    @classmethod
    def by(cls, op: Any, args: tuple[Any, ...], tensor: Tensor, sized: bool = False) -> Write:
        """What a call of `op` writes to `tensor`. One that may depend on a size of the example
        (`sized`) is no number that is known."""
        if op is aten.zero_.default:
            return cls(tensor, 0.0)
        return cls(tensor, float(args[1]) if op is aten.fill_.Scalar and not sized else None)

    def label_like(self, label: Tensor, origin: Tensor) -> Tensor | None:
        """The label of the tensor that has all channels of another one, if there is one. `origin`:
        for each atom the one that it was before the cuts on its way."""
        flat = origin[label.reshape(-1)]
        return next((x for x in self.labels if torch.equal(origin[x.reshape(-1)], flat)), None)


def carried(labels: Labels, writes: Sequence[Write], origin: Tensor) -> bool:
    """Whether a value that was written into, maybe in part, has the channels that it had."""
    return all(write.label_like(label, origin) is not None for write in writes for label in labels)


def mixed(
    facts: Facts | None, labels: Labels, rank: int, writes: Sequence[Write], origin: Tensor
) -> Facts | None:
    """What is known of such a value: what all say of a channel that may be in it in part."""
    if facts is None or len(labels) != 1 or len(varying(labels[0])) != 1:
        return None
    dim, size = varying(labels[0])[0], labels[0].numel()
    line = facts.along(dim, size)
    for write in writes:
        label = write.label_like(labels[0], origin)
        if line is None or label is None or write.facts is None:
            return None
        new = write.facts.along(varying(label)[0], size)
        if new is None:
            return None
        same = line.flat & new.flat & (line.values == new.values).all(0)
        line = Facts.of(same, line.values)
    return None if line is None else line.spread(rank, dim)


def filled(facts: Facts | None, tensor: Tensor, writes: Sequence[Write]) -> Facts | None:
    """What is known of a vector after numbers were written into its memory."""
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
