"""Numbers that are put in places: channels elsewhere pass, and go together in all operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, compress, varying
from demp_fx.channels.rules.elementwise import either
from demp_fx.channels.rules.pick import indexed, somewhere
from demp_fx.channels.rules.pointwise import aligned
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call
from demp_fx.channels.values import STRUCTURE

aten = torch.ops.aten
PLACED = "numbers are put in places along its axis"


def scatter(walk: Stream, call: Call) -> None:
    """`x.index_add(dim, index, source)`, `x.scatter(dim, index, source)` and their like."""
    x, dim, index = call.args[0], call.args[1] % max(1, call.args[0].dim()), call.args[2]
    source = call.args[3] if len(call.args) > 3 else None
    sources = [source] if isinstance(source, Tensor) else []
    whole = "scatter" in call.op._schema.name  # an index for each number, not for each slice
    operands = [x, *sources, index] if whole else [x, *sources]
    if any(_apart(t.shape, dim) != _apart(x.shape, dim) for t in operands):
        walk.leave(call, "numbers are put in some of its channels")
        return
    for label in () if whole else walk.value(index).labels:
        walk.pin(call, label, STRUCTURE)
    labels = _met(walk, call, operands, {dim})
    adds = "add" in call.op._schema.name or call.arg("reduce") is not None
    walk.give(call.outputs[0], labels, _facts(walk, x, sources, {dim}, adds))


def _apart(shape: Sequence[int], dim: int) -> list[int]:
    return [n for d, n in enumerate(shape) if d != dim]


def _met(walk: Stream, call: Call, operands: list[Tensor], dims: set[int]) -> Labels:
    """The labels of operands that meet each other, but for those on `dims`, which are pinned."""
    aside: list[tuple[Tensor, Labels]] = []
    for tensor in operands:
        labels = walk.value(tensor).labels
        on = tuple(label for label in labels if set(varying(label)) & dims)
        for label in on:
            walk.pin(call, label, PLACED)
        walk.relabel(tensor, tuple(label for label in labels if not set(varying(label)) & dims))
        aside.append((tensor, on))
    met = aligned(walk, Call(call.op, tuple(operands), {}, call.out, call.site), operands[0])
    for tensor, on in aside:
        walk.relabel(tensor, (*walk.value(tensor).labels, *on))
    return met


def _facts(
    walk: Stream, x: Tensor, sources: list[Tensor], dims: set[int], adds: bool
) -> Facts | None:
    """What is known where numbers of either operand may be; zeros that are added are zeros."""
    if not walk.with_facts or len(sources) != 1:
        return None
    known, new = walk.value(x).facts, walk.value(sources[0]).facts
    if known is None or new is None:
        return None
    known, new = known.aligned(x.dim()), new.aligned(x.dim())
    if any(f.known.size(d) > 1 for f in (known, new) for d in dims):
        return None
    found = either(known, new, x)
    return Facts.of(found.zero, found.values) if found is not None and adds else found


def put(walk: Stream, call: Call) -> None:
    """`x[index] = values`: what is at one place in both of them is one."""
    x, given, values = call.args[:3]
    picks = [i for i in given if i is not None]
    dims = set(indexed(given))
    if any(i.dtype == torch.bool for i in picks):
        if len(picks) > 1:
            walk.leave(call, "numbers are put in places that only data tells")
            return
        if values.numel() == 1 and given[0] is not None:
            _mask(walk, call, x, picks[0], values)
            return
    for label in (x for i in picks for x in walk.value(i).labels):
        walk.pin(call, label, STRUCTURE)
    zeros: list[Any] = [n for i in given for n in ([None] if i is None else somewhere(i))]
    target = aten.index.Tensor(
        torch.empty(x.shape, device="meta"), [None if z is None else z.to("meta") for z in zeros]
    )
    labels, kept = [], []
    for label in walk.value(x).labels:
        if set(varying(label)) & dims:
            walk.pin(call, label, PLACED)
        else:
            shape = [x.size(d) if d in dims else n for d, n in enumerate(label.shape)]
            labels.append(compress(aten.index.Tensor(label.expand(shape), zeros)))
            kept.append(label)
    walk.give(target, tuple(labels), moved=True)
    aligned(walk, Call(call.op, (target, values), {}, call.out, call.site), target)
    facts = None
    leading = dims == set(range(len(dims))) and values.dim() <= x.dim()
    if leading or (target.dim() == x.dim() and len(picks) == 1):  # the others are where they were
        facts = _facts(walk, x, [values], dims, bool(call.arg("accumulate")))
    walk.give(call.outputs[0], tuple(kept), facts)


def _mask(walk: Stream, call: Call, x: Tensor, mask: Tensor, values: Tensor) -> None:
    """`x[mask] = number`: elementwise."""
    spread = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
    shapes = [(*label.shape, *[1] * (x.dim() - mask.dim())) for label in walk.value(mask).labels]
    found = zip(walk.value(mask).labels, shapes, strict=True)
    walk.give(spread, tuple(label.reshape(shape) for label, shape in found), moved=True)
    labels = _met(walk, call, [x, spread], set())
    walk.give(call.outputs[0], labels, _facts(walk, x, [values], set(), call.arg("accumulate")))


_SCATTERS = ("index_add", "index_copy", "index_reduce", "scatter", "scatter_add", "scatter_reduce")
RULES: dict[str, Rule] = {
    **{f"aten::{name}{end}": scatter for name in _SCATTERS for end in ("", "_")},
    **dict.fromkeys(("aten::index_put", "aten::index_put_", "aten::_index_put_impl_"), put),
}
