"""Tensors put together: beside each other along a dim, or on a new one."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.blanks import adopt
from demp_fx.channels.blocks import rows_of
from demp_fx.channels.facts import Facts, joined, same_place, unknown
from demp_fx.channels.labels import along, beside, varying
from demp_fx.channels.rules.move import compressed
from demp_fx.channels.rules.pointwise import adopted
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call


def cat(walk: Stream, call: Call) -> None:
    """Join labels along the dim of the join; a piece without any leaves its places bare (0)."""
    tensors, out = call.tensors, call.outputs[0]
    tensors = [t for t in tensors if t.dim() == out.dim()]
    dim = (call.arg("dim") or 0) % out.dim()
    _adopt(walk, tensors, dim)
    adopted(walk, tensors, out.dim(), aside=dim)
    given = _levelled(walk, call, tensors, dim)
    for found in given:  # a dim that two axes were merged into has two labels, a join has one
        keys = [varying(label) for label in found]
        for label, key in zip(found, keys, strict=True):
            if keys.count(key) > 1:
                walk.pin(call, label, "is joined with channels of another axis merged in")
    labels, sizes = [], [t.size(dim) for t in tensors]
    for key in sorted({varying(label) for found in given for label in found}):
        pieces = [_piece(found, key, out.dim()) for found in given]
        if dim in key:
            labels.append(beside(pieces, sizes, dim))
            if len(key) > 1:
                _same_rows(walk, call, pieces, tuple(d for d in key if d != dim))
            continue
        full = [p for p in pieces if p.numel() > 1]
        for p in pieces:
            if p.numel() == 1:
                walk.pin(call, full[0], "is joined with channels that no parameter makes")
            else:
                walk.joins = True
                walk.system.same(full[0], p, call.site)
        labels.append(full[0])
    known = [walk.value(t).facts for t in tensors] if walk.with_facts else []
    facts = joined(known, sizes, out.dim(), dim)
    walk.give(out, tuple(labels), facts)


def _adopt(walk: Stream, tensors: list[Tensor], dim: int) -> None:
    """Constants that are joined with channels, and may be as many as the sizes want that they are
    given, are channels of their own: but not beside what stays anyway, as positions do, of which
    the input may have others."""
    beside = [x for t in tensors for x in walk.value(t).labels if dim in varying(x)]
    joined = not all(map(walk.system.is_fixed, beside))
    for t in tensors if joined else ():
        value = walk.value(t)
        bare = not any(dim in varying(label) for label in value.labels)
        if bare and dim in value.blank and t.size(dim) > 1:
            atoms = walk.system.fresh(f"{walk.site.node}.joined", -1, t.size(dim)).atoms
            adopt(walk, t, along(atoms, t.dim(), dim))


def stack(walk: Stream, call: Call) -> None:
    """Values beside each other on a new dim: what is at one place in each of them is one."""
    tensors, out = call.tensors, call.outputs[0]
    dim = (call.arg("dim") or 0) % out.dim()
    adopted(walk, tensors, tensors[0].dim())
    given = _levelled(walk, call, tensors)
    labels: dict[tuple[int, ...], Tensor] = {}
    for key in sorted({varying(label) for found in given for label in found}):
        pieces = [_piece(found, key, tensors[0].dim()) for found in given]
        full = next(p for p in pieces if p.numel() > 1)
        labels[key] = full.unsqueeze(dim)
        for p in pieces:
            if p.numel() == 1:
                walk.pin(call, full, "is joined with channels that no parameter makes")
            else:
                walk.system.same(full, p, call.site)
    found = [walk.value(t).facts for t in tensors]
    agree = all(f is not None and found[0] is not None and f.same_as(found[0]) for f in found)
    facts = _stacked_facts(found, out.dim() - 1, dim) if walk.with_facts else None
    walk.splits |= any(f is not None for f in found) and not agree
    walk.give(out, tuple(labels.values()), facts)


def _same_rows(walk: Stream, call: Call, pieces: list[Tensor], dims: tuple[int, ...]) -> None:
    """Blocks that are joined side by side: they go together."""
    if any(varying(p) != varying(pieces[0]) for p in pieces):
        for p in pieces:
            walk.pin(call, p, "is joined with channels that no parameter makes")
        return
    rows = [rows_of(p, dims) for p in pieces]
    gate = walk.rows(torch.stack([r[:, 0] for r in rows], 1))
    for row in rows:
        walk.link(row, gate, call.site)


def _levelled(
    walk: Stream, call: Call, tensors: list[Tensor], dim: int | None = None
) -> list[list[Tensor]]:
    """The labels of each operand. Where one has blocks of channels, and another has channels on
    some of their dims only, what is at one place in each block is one."""
    given = [list(walk.value(t).labels) for t in tensors]
    keys = {varying(label) for found in given for label in found}
    for found in given:
        own = {varying(label) for label in found}
        for k, label in enumerate(found):
            blocks = set(varying(label))
            within = [key for key in keys - own if set(key) < blocks and dim not in blocks]
            if len(within) == 1:
                found[k] = walk.tie(label, tuple(blocks - set(within[0])), call)
    return given


def _piece(labels: list[Tensor], key: tuple[int, ...], rank: int) -> Tensor:
    for label in labels:
        if varying(label) == key:
            return label
    return torch.zeros((1,) * rank, dtype=torch.int64)


def _stacked_facts(found: list[Facts | None], rank: int, dim: int) -> Facts | None:
    if all(f is None for f in found):
        return None
    filled = same_place([unknown(rank) if f is None else f.aligned(rank) for f in found])
    known, evaluated, trained, profile = (
        torch.stack(parts, dim)
        for parts in zip(*((f.known, *f.values, f.profile) for f in filled), strict=True)
    )
    return compressed(known, evaluated, trained, profile)


RULES: dict[str, Rule] = {"aten::cat": cat, "aten::stack": stack}
