"""Linear systems of equations: each right-hand side is solved on its own, with the same matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, varying
from demp_fx.channels.rules.pointwise import aligned
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call

aten = torch.ops.aten


def solved(walk: Stream, call: Call) -> None:
    """X with A X = B (`left`) or X A = B: where a column (or a row) of B is zero, X is.

    Channels may lie on the other dim of B, and on what both have in front (heads, say): there each
    matrix goes with its own right-hand sides.
    """
    matrix, given = call.tensors[:2]
    out, mixed = call.outputs[0], given.dim() - (1 if call.arg("left") is False else 2)
    square = {matrix.dim() - 2, matrix.dim() - 1}
    apart = torch.empty((*matrix.shape[:-2], 1, 1), dtype=out.dtype, device="meta")
    walk.give(apart, _apart(walk, call, matrix, square), moved=True)
    sides = torch.empty(given.shape, dtype=out.dtype, device="meta")
    walk.give(sides, _apart(walk, call, given, {mixed}), moved=True)
    labels = aligned(walk, Call(aten.mul.Tensor, (apart, sides), {}, out, call.site), out)
    facts = walk.value(given).facts if walk.with_facts else None
    if facts is not None:
        facts = facts.aligned(given.dim())
        facts = Facts.of(facts.zero, facts.values) if facts.known.size(mixed) == 1 else None
    for factor in call.outputs[1:]:
        walk.give(factor, ())
    walk.give(out, labels, facts)


def _apart(walk: Stream, call: Call, tensor: Tensor, mixed: set[int]) -> Labels:
    """The labels of dims that the system keeps apart; all channels on the others are needed."""
    labels = walk.value(tensor).labels
    for label in labels:
        if mixed & set(varying(label)):
            walk.pin(call, label, "a system of equations is solved over channels")
    return tuple(label for label in labels if not mixed & set(varying(label)))


RULES: dict[str, Rule] = dict.fromkeys(
    ("aten::linalg_solve_triangular", "aten::_linalg_solve_ex", "aten::linalg_solve"), solved
)
