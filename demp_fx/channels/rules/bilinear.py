"""Bilinear layers: "bi,oij,bj->bo", of which both inputs are read."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.constraints import Read
from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import along, varying
from demp_fx.channels.rules.operand import Operand
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call

LAYER = ([1, 3], [0], [1, 2], [2, 3])  # where `nn.Bilinear` lets dims stand, and which it sums


def trilinear(walk: Stream, call: Call) -> None:
    """Each result needs, of either input, all channels that are not dead."""
    if tuple(list(a) for a in call.args[3:7]) != LAYER:
        walk.leave(call, "sums over products of three values")
        return
    weight, out = call.args[1], call.outputs[0]
    filters = Operand(weight, "oij").single(walk, "o")
    sides = [] if filters is None else [filters]
    outputs = tuple(sides)
    macs = out.numel() * weight[0].numel()
    for x, letter in ((call.args[0], "i"), (call.args[2], "j")):
        source = Operand(x, f"b{letter}").single(walk, letter)
        columns = Operand(weight, "oij").single(walk, letter)
        labels = walk.value(x).labels
        if source is None or columns is None:
            labels += tuple(Operand(weight, "oij").labels(walk, letter))
        else:
            labels = tuple(label for label in labels if varying(label) != (1,))
            walk.system.same(source, columns, call.site)
            sides.append(source)
            walk.system.flow.append(_read(walk, call, x, letter, source, outputs, macs))
        for label in labels:
            walk.pin(call, label, "reads channels that no parameter makes, or several axes at once")
    walk.system.multiply(macs, *sides)
    zero = walk.value(weight).facts if walk.with_facts else None
    rows = None if zero is None else zero.along(0, weight.size(0))
    known = None if rows is None else Facts.of(rows.zero, torch.zeros_like(rows.values))
    walk.give(
        out,
        () if filters is None else (along(filters, 2, 1),),
        None if known is None else known.spread(2, 1),
    )


def _read(
    walk: Stream, call: Call, x: Tensor, letter: str, source: Tensor, outputs: tuple[Tensor, ...],
    macs: int,
) -> Read:  # fmt: skip
    weight = call.args[1]
    facts = walk.value(x).facts if walk.with_facts else None
    data = walk.value(weight).data if walk.with_facts else None
    return Read(
        source, outputs, None if facts is None else facts.along(1, source.numel()),
        None if data is None else walk.empty(data, Operand(weight, "oij").dim(letter)),
        None, macs, weight.numel(), call.site,
    )  # fmt: skip


RULES: dict[str, Rule] = {"aten::_trilinear": trilinear}
