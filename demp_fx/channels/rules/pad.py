"""Padding with a constant. Channels that are padded on are channels of their own, made of that
constant: as many of them stay as somebody needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.blocks import outer_to_inner, recurs_along
from demp_fx.channels.facts import Facts, joined
from demp_fx.channels.input_sizes import at_larger
from demp_fx.channels.labels import along, varying
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call, Inside

MANY = 64  # sizes, beyond any stride
Ends = dict[int, tuple[int, int]]  # by dim: how much is padded on before it, and behind it


def pad(walk: Stream, call: Call) -> None:
    """Padding of dims without channels leaves labels alone; on others, it makes channels."""
    x, out, rank = call.args[0], call.outputs[0], call.args[0].dim()
    named = _ends(call.args[1], rank)
    ends = {d: both for d, both in named.items() if any(both)}
    labels, grown = [], set()
    for label in walk.value(x).labels:
        met = ends.keys() & set(varying(label))
        d = next(iter(met), None)
        if d is not None and len(varying(label)) > 1 and recurs_along(label, d):
            label, d = walk.tie(label, (d,), call), None  # no more are known to be padded on
        if d is None:
            labels.append(label)
        elif len(met) == 1 and d not in grown and min(ends[d]) >= 0:
            grown.add(d)
            labels.append(_grown(walk, call, label, d, ends[d]))
        else:
            walk.pin(call, label, "padding adds channels")
    fill: Any = call.arg("value") or 0.0
    facts = before = walk.value(x).facts if walk.with_facts else None
    uneven = ends.keys() - grown
    if walk.running.sized:  # more may be padded on to another input, but no channels
        uneven |= named.keys() - {d for label in walk.value(x).labels for d in varying(label)}
    if uneven:  # known in every place only where all are alike
        facts = Facts.of(facts.zero, facts.values) if facts is not None and fill == 0.0 else None
        if facts is not None and any(facts.known.size(d) > 1 for d in uneven):
            facts = None
    constant = Facts.exactly(torch.tensor(fill, dtype=out.dtype)).aligned(rank)
    for d in grown if walk.with_facts else ():
        first, last = ends[d]
        facts = joined([constant, facts, constant], [first, x.size(d), last], rank, d)
    walk.give(out, tuple(labels), facts)
    if before is not None and not grown:
        margins = _margins(walk, named, rank)
        walk.value(out).inside = None if margins is None else Inside(before, fill, margins)


def _ends(amounts: Sequence[int], rank: int) -> Ends:
    """The last dim's two amounts come first."""
    pairs = zip(amounts[::2], amounts[1::2], strict=True)
    return {rank - 1 - k: both for k, both in enumerate(pairs)}


def _margins(walk: Stream, ends: Ends, rank: int) -> dict[int, int] | None:
    """How much is padded on at either end at most: where that depends on sizes, at any of many.
    None where it is not known."""
    found = [ends]
    if walk.running.sized:
        node = walk.running.node
        amounts = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else None)
        with suppress(Exception):  # not all that makes numbers can be run again
            larger = (at_larger(walk.running.env, amounts, n) for n in range(1, MANY))
            found += [_ends(list(map(int, given)), rank) for given in larger]
        if len(found) < MANY:
            return None
    widest = {d: max(max(at[d]) for at in found) for d in ends}
    return {d: width for d, width in widest.items() if width}


def _grown(walk: Stream, call: Call, label: Tensor, dim: int, ends: tuple[int, int]) -> Tensor:
    """A label with fresh atoms before and behind its own; of blocks, with fresh ones in each, which
    are blocks of one axis again."""
    before, behind = ends
    order = outer_to_inner(label)
    sizes = [label.size(d) + (before + behind if d == dim else 0) for d in order]
    fresh = walk.system.fresh(f"{call.site.node}.padding", -1, math.prod(sizes)).atoms
    if len(order) == 1:
        flat = label.reshape(-1)
        return along(
            torch.cat([fresh[:before], flat, fresh[sizes[0] - behind :]]), label.dim(), dim
        )
    ranked = sorted(order)
    grown = fresh.reshape(sizes).permute([order.index(d) for d in ranked])
    grown = grown.reshape([sizes[order.index(d)] if d in order else 1 for d in range(label.dim())])
    walk.system.same(grown.narrow(dim, before, label.size(dim)), label, call.site)
    walk.shaped.append(grown)
    walk.splits = walk.opens = True
    return grown


RULES: dict[str, Rule] = {"aten::constant_pad_nd": pad}
