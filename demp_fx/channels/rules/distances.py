"""Distances between rows of two matrices: a channel that is zero in both adds nothing to any."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.rules.couple import couple, trailing
from demp_fx.channels.rules.elementwise import constants
from demp_fx.channels.rules.pointwise import aligned
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call

aten = torch.ops.aten
EXACT = 2  # without products


def distances(walk: Stream, call: Call) -> None:
    """`cdist(x, y)`: the norms of the differences of each row of x and each of y.

    Euclidean ones may be made of products. Of rows that are alike, as both of them can hold if they
    depend on the input, that leaves a root of what was rounded: other channels, another one.
    """
    x, y = call.tensors[:2]
    values = walk.value(x), walk.value(y)
    exact = call.arg("p") not in (2, None) or call.arg("compute_mode") == EXACT
    if not exact and all(v.data is None and not v.table for v in values):
        walk.leave(call, "the distances of rows that may be the same are rounded")
        return
    left, right = _beside(walk, x, -2), _beside(walk, y, -3)
    shape = torch.broadcast_shapes(left.shape, right.shape)
    out = torch.empty(shape, dtype=x.dtype, device="meta")
    less = Call(aten.sub.Tensor, (left, right), {}, out, call.site)
    labels = aligned(walk, less, out)
    walk.give(out, labels, constants(walk, less, out) if walk.with_facts else None, moved=True)
    couple(trailing(1), "cdist", "zero")(walk, Call(call.op, (out,), {}, call.out, call.site))


def _beside(walk: Stream, x: Tensor, dim: int) -> Tensor:
    """The rows of a matrix, to be broadcast against those of another one."""
    value, facts = walk.value(x), None
    if walk.with_facts:
        facts = value.facts if value.data is None else walk.slices(value.data)
    out = torch.empty(x.shape, dtype=x.dtype, device="meta").unsqueeze(dim)
    labels = tuple(label.unsqueeze(dim) for label in value.labels)
    if facts is not None:
        facts = facts.aligned(x.dim()).map(lambda t: t.unsqueeze(dim))
    walk.give(out, labels, facts, moved=True)
    return out


RULES: dict[str, Rule] = dict.fromkeys(
    ("aten::_cdist_forward", "aten::_euclidean_dist", "aten::cdist"), distances
)
