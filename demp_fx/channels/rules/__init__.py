"""What each ATen op couples: one table, a file for each family.

`RULES` maps an op (all its overloads) to a rule; an op that is in no row falls to its family as the
dispatcher itself classifies it (views move, pointwise ops align), and otherwise is opaque.
"""

from __future__ import annotations

import torch

from demp_fx.channels.followed import follow
from demp_fx.channels.rules import (
    bilinear,
    complex,
    contract,
    convolution,
    couple,
    distances,
    join,
    made,
    max_pool,
    move,
    norm,
    pad,
    pick,
    pointwise,
    quantised,
    recurrent,
    scatter,
    solved,
    windows,
)
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call

RULES: dict[str, Rule] = {
    **move.RULES,
    **join.RULES,
    **pad.RULES,
    **pick.RULES,
    **pointwise.RULES,
    **quantised.RULES,
    **made.RULES,
    **contract.RULES,
    **convolution.RULES,
    **norm.RULES,
    **couple.RULES,
    **max_pool.RULES,
    **distances.RULES,
    **recurrent.RULES,
    **complex.RULES,
    **bilinear.RULES,
    **scatter.RULES,
    **solved.RULES,
    **windows.RULES,
}


def rule_of(op: torch._ops.OpOverload) -> Rule:
    """The rule of an op: its row, its family, or `opaque`."""
    rule = RULES.get(op._schema.name)
    if rule is not None:
        return rule
    if torch.Tag.pointwise in op.tags or torch.Tag.pointwise in _out_of_place(op).tags:
        return pointwise.pointwise
    if op.is_view:
        return move.move
    return opaque


def _out_of_place(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The op that one in place is named after, if it is one: not all of them have its tags."""
    space, _, name = op._schema.name.partition("::")
    if space != "aten" or not name.endswith("_"):
        return op
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, op._overloadname, op)


def opaque(walk: Stream, call: Call) -> None:
    """An op that has no row: everything it touches stays as it is, and the report says so. An
    autograd function is what its forward and its backward do, where these can be followed."""
    if follow(walk, call):
        return
    walk.leave(call, f"{call.op._schema.name} is not known to keep channels apart")
