"""Indices: numbers that are known pick channels as they pick anything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.labels import repeats, varying
from demp_fx.channels.rules.move import move
from demp_fx.channels.rules.pointwise import aligned
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call, Value
from demp_fx.channels.values import STRUCTURE


def index(walk: Stream, call: Call) -> None:
    """`x[..., numbers]`: known numbers pick channels as they pick anything; others keep them, and
    so do channels with which another axis is merged: what is where depends on how long that is."""
    x = call.args[0]
    given = call.args[1] if isinstance(call.args[1], (list, tuple)) else None
    picks = [call.args[2]] if given is None else [i for i in given if i is not None]
    dims = [call.args[1] % x.dim()] if given is None else indexed(given)
    numbers = [_content(walk, i) for i in picks]
    for i in picks:
        for label in walk.value(i).labels:
            walk.pin(call, label, STRUCTURE)
    before = walk.value(x)
    labels, facts = before.labels, before.facts if walk.with_facts else None
    unknown = any(n is None for n in numbers)
    merged = any(set(varying(label)) & set(dims) and repeats(label) for label in labels)
    if unknown or merged or before.data is not None:  # what is in a table is no channel
        for label in labels:
            if set(varying(label)) & set(dims):
                walk.pin(call, label, "its rows are looked up")
        labels = tuple(t for t in labels if not set(varying(t)) & set(dims))
    places = [somewhere(i) if unknown else [n] for i, n in zip(picks, numbers, strict=True)]
    feed = iter(places)
    args: tuple[Any, ...] = (x, call.args[1], places[0][0])
    if given is not None and len(picks) == 1 and picks[0].dim() == 1:
        args = (x, dims[0], places[0][0])
    elif given is not None:
        args = (x, [n for i in given for n in ([None] if i is None else next(feed))])
    if walk.with_facts and before.data is not None and not before.vector:
        facts = walk.slices(before.data, but=dims if unknown else ())
    elif (unknown or merged) and facts is not None:
        facts = facts if all(facts.known.size(d) == 1 for d in dims) else None
    x.__dict__["demp"] = Value(labels, facts, version=before.version)
    move(walk, Call(call.op, args, {}, call.out, call.site))
    x.__dict__["demp"] = before


def somewhere(index: Tensor) -> list[Tensor]:
    """Numbers in the place of an index that is not known. A mask is one for each dim it has."""
    if index.dtype == torch.bool:
        return [torch.zeros(1, dtype=torch.int64)] * index.dim()
    return [torch.zeros(index.shape, dtype=torch.int64)]


def indexed(given: Sequence[Tensor | None]) -> list[int]:
    """Which dims a list of indices is about; a mask takes as many as it has."""
    dims, at = [], 0
    for i in given:
        width = i.dim() if i is not None and i.dtype == torch.bool else 1
        dims += list(range(at, at + width)) if i is not None else []
        at += width
    return dims


def _content(walk: Stream, numbers: Tensor) -> Tensor | None:
    """The numbers in an index, where they do not depend on the input."""
    real = walk.value(numbers).data
    if real is None and not numbers.is_meta:
        real = numbers
    return None if real is None or real.is_meta or real.dtype == torch.bool else real.cpu()


def gather(walk: Stream, call: Call) -> None:
    """Along one dim numbers are picked, as many as there are indices; elsewhere each place has
    indices of its own."""
    x, out, dim = call.args[0], call.outputs[0], call.args[1] % call.args[0].dim()
    before = walk.value(x)
    for label in before.labels:
        if dim in varying(label):
            walk.pin(call, label, "its rows are looked up")
    walk.relabel(x, tuple(label for label in before.labels if dim not in varying(label)))
    labels = aligned(walk, call, out)
    x.__dict__["demp"] = before
    facts = before.facts if walk.with_facts else None
    same = all(a == b for d, (a, b) in enumerate(zip(x.shape, out.shape, strict=True)) if d != dim)
    kept = facts if facts is not None and same and facts.known.size(dim) == 1 else None
    walk.give(out, labels, kept)


def ranked(walk: Stream, call: Call) -> None:
    """The place of each number in a sorted list, the same one for all of them."""
    x, out = call.arg("self"), call.outputs[0]
    lists = [t for t in call.tensors if t is not x]
    passes = isinstance(x, Tensor) and all(t.dim() == 1 for t in lists)
    for t in lists if passes else call.tensors:
        for label in walk.value(t).labels:
            walk.pin(call, label, "its places in a sorted list are looked up")
    walk.give(out, walk.value(x).labels if passes else ())


RULES: dict[str, Rule] = {
    "aten::index": index,
    "aten::index_select": index,
    "aten::gather": gather,
    "aten::bucketize": ranked,
    "aten::searchsorted": ranked,
}
