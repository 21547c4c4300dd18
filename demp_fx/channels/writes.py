"""What is written in place, and what a tensor holds afterwards that shares the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts, agreed
from demp_fx.channels.labels import Labels, varying

aten = torch.ops.aten


def memory_of(tensor: Tensor) -> int:
    """What tells whether tensors share memory; sparse ones have none to share. A twin on meta has
    that of its original."""
    twin: int | None = tensor.__dict__.get("memory")
    if twin is not None:
        return twin
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


@dataclass(slots=True, eq=False)
class Write:
    """What an op wrote into a tensor: one number everywhere, or anything (None).

    `labels`: those of the tensor, if it has them as before, or was a constant that takes any: each
    channel was written into itself. `finer`: the one that several axes (heads, and channels in
    each) got instead, to which theirs (`coarse`) are tied. `facts`: what is known of the tensor
    now.
    """

    tensor: Tensor
    number: float | None
    labels: Labels = ()
    finer: Tensor | None = None
    coarse: Labels = ()
    facts: Facts | None = None

    @classmethod
    def by(cls, op: Any, args: tuple[Any, ...], tensor: Tensor, sized: bool = False) -> Write:
        """What a call of `op` writes to `tensor`. One that may depend on a size of the example
        (`sized`) is no number that is known."""
        if op is aten.zero_.default:
            return cls(tensor, 0.0)
        return cls(tensor, float(args[1]) if op is aten.fill_.Scalar and not sized else None)

    def met(self, label: Tensor, origin: Tensor) -> tuple[Tensor, Tensor] | None:
        """The label of the tensor that has channels of another one, all or a part of them, and
        which those are. `origin`: for each atom the one that it was before the cuts on its way."""
        line = origin[label.reshape(-1)]
        order = line.argsort()
        for x in self.labels:
            own = origin[x.reshape(-1)]
            if torch.equal(own, line):
                return x, torch.arange(line.numel())
            places = order[torch.searchsorted(line, own, sorter=order).clamp(max=line.numel() - 1)]
            if line.unique().numel() == line.numel() and torch.equal(line[places], own):
                return x, places
        return None


def carried(labels: Labels, writes: Sequence[Write], origin: Tensor) -> bool:
    """Whether a value that was written into, maybe in part, has the channels that it had."""
    return all(write.met(label, origin) is not None for write in writes for label in labels)


def _is_same(one: Tensor, other: Tensor, origin: Tensor) -> bool:
    return torch.equal(origin[one.reshape(-1)], origin[other.reshape(-1)])


def refined(value: Labels, writes: Sequence[Write], origin: Tensor) -> Tensor | None:
    """The finer label of a value after such writes into parts of its memory, if they all gave it
    the same one, over axes that are whole in both, and in the same place."""
    finer = writes[0].finer
    if finer is None or any(w.finer is None or not torch.equal(w.finer, finer) for w in writes):
        return None
    own = {varying(x): x for x in value if x.dim() == finer.dim()}
    parts = [{varying(x): x for x in write.coarse} for write in writes]
    fits = all(
        (d,) in own and all((d,) in p and _is_same(own[d,], p[d,], origin) for p in parts)
        for d in varying(finer)
    )
    return finer if fits else None


def known_of(facts: Facts | None, label: Tensor, writes: Sequence[Write]) -> Facts | None:
    """What is known of a value that has a finer label: what all say of a channel of that."""
    found = [_by(f, label) if f is not None else None for f in (facts, *(w.facts for w in writes))]
    line = found[0]
    for new in found[1:]:
        if line is None or new is None:
            return None
        line = agreed(line, new)
    return None if line is None else line.map(lambda t: t.reshape(label.shape))


def _by(facts: Facts, label: Tensor) -> Facts | None:
    """Facts by the channels of a label over several axes, which are known where they are alike."""
    dims = varying(label)
    order = (*dims, *(d for d in range(label.dim()) if d not in dims))

    def channels_first(t: Tensor) -> Tensor:
        sizes = [label.size(d) if d in dims else -1 for d in range(label.dim())]
        return t.expand(sizes).permute(order).flatten(0, len(dims) - 1)

    return facts.aligned(label.dim()).map(channels_first).along(0, label.numel())


def mixed(
    facts: Facts | None, labels: Labels, rank: int, writes: Sequence[Write], origin: Tensor
) -> Facts | None:
    """What is known of such a value: what all say of a channel that may be in it in part."""
    if facts is None or len(labels) != 1 or len(varying(labels[0])) != 1:
        return None
    dim, size = varying(labels[0])[0], labels[0].numel()
    line = facts.along(dim, size)
    for write in writes:
        met = write.met(labels[0], origin)
        if line is None or met is None or write.facts is None:
            return None
        label, places = met
        if len(varying(label)) != 1:
            return None
        new = write.facts.along(varying(label)[0], label.numel())
        if new is None:
            return None
        known = line.flat.clone()
        known[places] &= new.flat & (line.values[:, places] == new.values).all(0)
        line = Facts.of(known, line.values)
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
