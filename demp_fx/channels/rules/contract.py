"""Contractions: an equation says which dims meet; the summed one is a read.

The rows of the table are equations in einsum letters; `convolution` is "bi*,oi*->bo*".
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from demp_fx.channels.blanks import adopt
from demp_fx.channels.blocks import outer_to_inner, rows_of
from demp_fx.channels.constraints import Fold, Multiple, Read
from demp_fx.channels.labels import along, moved, varying
from demp_fx.channels.rules.cells import told_apart
from demp_fx.channels.rules.known import constants, zero_at
from demp_fx.channels.rules.operand import Operand
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call
from demp_fx.shapes import ALIGNED

aten = torch.ops.aten
UNLABELLED = "reads channels that no parameter makes, such as the network's input"


def contract(equation: str, bias: str | None = None) -> Rule:
    """The rule of a contraction of two operands; `bias` names the argument added to the result."""
    left, right, result = equation.replace("->", ",").split(",")

    def rule(walk: Stream, call: Call) -> None:
        tensors = [t for t in call.tensors if bias is None or t is not call.arg(bias)]
        a, b = Operand(tensors[0], left), Operand(tensors[1], right)
        meet(walk, call, a, b, result, call.arg(bias) if bias is not None else None)

    return rule


def linear(walk: Stream, call: Call) -> None:
    """...i,oi->...o"""
    x, weight, bias = call.args
    others = "ABCDEFGHJKLMNPQRSTUVWXYZ"[: x.dim() - 1]
    meet(walk, call, Operand(x, others + "i"), Operand(weight, "oi"), others + "o", bias)


def meet(
    walk: Stream, call: Call, a: Operand, b: Operand, result: str, bias: Tensor | None,
    padded: bool = False, macs: int = 0,
) -> None:  # fmt: skip
    """Contract `a` (data) with `b` (weights, or more data) into the call's result.

    `padded`: zeros are read beyond the border. `macs`: multiplications, where the equation alone
    does not tell.
    """
    out = call.outputs[0]
    place = {letter: k for k, letter in enumerate(result)}
    shared = set(a.letters) & set(b.letters)
    batch = next(iter(shared & set(result)), None)
    if batch is not None:
        for operand in (a, b):
            _outermost(walk, call, operand, batch)
    for letter in shared - set(result):
        _adopt(walk, a, b, letter)
        told_apart(walk, call, b, letter, set(b.letters) - shared)
        if all(b.tensor.size(b.dim(other)) == 1 for other in set(b.letters) - shared):  # a vector
            told_apart(walk, call, a, letter, set(a.letters) - shared)
    gate = None if batch is None else _gate(walk, call, a, b, batch)
    labels = _kept(walk, call, a, b, place)
    if batch is not None and gate is not None:
        labels = [label for label in labels if varying(label) != (place[batch],)]
        if not any(place[batch] in varying(label) for label in labels):
            labels.append(along(gate, out.dim(), place[batch]))  # else rows of others say it all
    if bias is not None:
        add_bias(walk, call, labels, bias, out)
    read = None
    sides = list(labels)
    for letter in shared - set(result):
        macs = macs or out.numel() * a.tensor.size(a.dim(letter))
        outputs = tuple(label.reshape(-1) for label in labels)
        sides += b.labels(walk, letter) or a.labels(walk, letter)
        if gate is None or batch is None:
            _tie_others(walk, call, a, b, letter)
            _positions_aside(walk, call, a, b, letter)
            read = _read(walk, call, a, b, letter, outputs, bias, padded, macs)
        else:
            _read_rows(walk, call, a, b, (batch, letter), gate, outputs, macs)
    walk.system.multiply(macs, *sides)
    facts = constants(walk, a, b, result, bias, padded, read) if walk.with_facts else None
    walk.give(out, tuple(labels), facts)


def _adopt(walk: Stream, a: Operand, b: Operand, letter: str) -> None:
    """A constant that may have as many channels as it meets (the first state of a loop, say) takes
    those of the weight that reads it."""
    value, d, channels = walk.value(a.tensor), a.dim(letter), b.single(walk, letter)
    if channels is not None and d in value.blank and not a.labels(walk, letter):
        adopt(walk, a.tensor, along(channels, a.tensor.dim(), d))


def _kept(walk: Stream, call: Call, a: Operand, b: Operand, place: dict[str, int]) -> list[Tensor]:
    """The labels of the result: what both operands carry on the same dims is one."""
    labels: list[Tensor] = []
    for operand in (a, b):
        dims = {d: place[x] for d, x in enumerate(operand.letters) if x in place}
        before = tuple(labels)
        for label in walk.value(operand.tensor).labels:
            kept = moved(label, dims, call.outputs[0].dim())
            if kept is None:
                continue
            same = [x for x in before if varying(x) == varying(kept)]
            for x in same:
                walk.system.same(x, kept, call.site)
            if not same:
                labels.append(kept)
    return labels


def _outermost(walk: Stream, call: Call, operand: Operand, letter: str) -> None:
    """Blocks of a batch letter have to be the outer ones: where they lie within others (a head
    dim split before the heads), what is at one place in each of them is one."""
    d, labels = operand.dim(letter), list(walk.value(operand.tensor).labels)
    for k, label in enumerate(labels):
        if d in varying(label) and outer_to_inner(label)[0] != d:
            labels[k] = walk.tie(label, (d,), call)
    walk.relabel(operand.tensor, tuple(labels))


def _gate(walk: Stream, call: Call, a: Operand, b: Operand, letter: str) -> Tensor | None:
    """An atom for each index of a batch letter (a head, say), alive with the channels behind it.

    Both operands must have channels there, or neither may lose any.
    """
    found = [(operand, label) for operand in (a, b) for label in operand.labels(walk, letter)]
    if not found:
        return None
    if len({id(operand) for operand, _ in found}) < 2:
        for _, label in found:
            walk.pin(call, label, "meets a value whose channels no parameter makes")
        return None
    rows = [rows_of(label, (operand.dim(letter),)) for operand, label in found]
    gate = walk.rows(torch.stack([r[:, 0] for r in rows], 1))
    for row in rows:
        if row.size(1) == 1:
            walk.system.same(row[:, 0], gate, call.site)
        else:
            walk.link(row, gate, call.site)
    return gate


def _tie_others(walk: Stream, call: Call, a: Operand, b: Operand, letter: str) -> None:
    """Where one weight serves all blocks, what is at the same place in each block is one."""
    for operand in (a, b):
        found, d = operand.labels(walk, letter), operand.dim(letter)
        if len(found) == 1 and len(varying(found[0])) > 1:
            rest = tuple(x for x in varying(found[0]) if x != d)
            line = walk.tie(found[0], rest, call)
            others = walk.value(operand.tensor).labels
            walk.relabel(operand.tensor, tuple(line if x is found[0] else x for x in others))


def _positions_aside(walk: Stream, call: Call, a: Operand, b: Operand, letter: str) -> None:
    """Where channels are summed over together with positions (of a kernel), the positions stay and
    the channels meet: of what both operands have there, the most."""
    lines = [[x for x in operand.labels(walk, letter) if varying(x) == (operand.dim(letter),)]
             for operand in (a, b)]  # fmt: skip
    if len(lines[0]) < 2 and len(lines[1]) < 2:
        return
    met = [pair for pair in itertools.product(*lines) if _one_to_one(*pair)]
    if not met:
        return
    channels = max(met, key=lambda pair: pair[0].unique().numel())
    for operand, kept in zip((a, b), channels, strict=True):
        rest = [x for x in operand.labels(walk, letter) if x is not kept]
        for label in rest:
            walk.pin(call, label, "is summed over together with another axis")
        labels = walk.value(operand.tensor).labels
        walk.relabel(operand.tensor, tuple(x for x in labels if all(x is not r for r in rest)))


def _one_to_one(a: Tensor, b: Tensor) -> bool:
    """Whether two labels of one dim are equal at the same places."""
    both = torch.stack([a.reshape(-1), b.reshape(-1)]).unique(dim=1)
    return bool(a.unique().numel() == b.unique().numel() == both.size(1))


def add_bias(walk: Stream, call: Call, labels: list[Tensor], bias: Tensor, out: Tensor) -> None:
    """Tie a bias to the labels of what it is added to."""
    rank, d = out.dim(), 1 if call.op._schema.name == "aten::convolution" else out.dim() - 1
    for label in walk.value(bias).labels:
        label = along(label, rank, d) if bias.dim() == 1 else label
        same = [x for x in labels if varying(x) == varying(label)]
        for x in same:
            walk.system.same(x, label, call.site)
        if not same:
            walk.pin(call, label, "is added to channels that no parameter makes")


def _read(
    walk: Stream, call: Call, a: Operand, b: Operand, letter: str, outputs: tuple[Tensor, ...],
    bias: Tensor | None, padded: bool, macs: int,
) -> Read | None:  # fmt: skip
    """The summed letter: both operands' channels are one, and the result needs those not dead."""
    one, other = a.single(walk, letter), b.single(walk, letter)
    if one is None or other is None:
        reason = UNLABELLED
        if a.labels(walk, letter) and b.labels(walk, letter):
            reason = "is summed over together with another axis"
        for label in a.labels(walk, letter) + b.labels(walk, letter):
            walk.pin(call, label, reason)
        return None
    walk.system.same(one, other, call.site)
    facts = walk.value(a.tensor).facts
    size = one.numel()
    silent, fold = None, None
    weight = walk.value(b.tensor).data
    if walk.with_facts:
        facts = facts.along(a.dim(letter), size) if facts is not None else None
        if weight is not None:
            silent = walk.empty(weight, b.dim(letter))
            axis = walk.axis_of(other)
            if axis is not None and axis.owner in walk.params:
                fold = Fold(axis.owner, axis.dim, _name(walk, bias), padded)
        else:
            silent = _zeros(walk, b, b.labels(walk, letter)[0])
    trained = weight is not None or walk.maker(b.tensor) is not None
    weights = b.tensor.numel() if trained else 0
    read = Read(one, outputs, facts, silent, fold, macs, weights, call.site)
    walk.system.flow.append(read)
    return read


def _read_rows(
    walk: Stream, call: Call, a: Operand, b: Operand, letters: tuple[str, str], gate: Tensor,
    outputs: tuple[Tensor, ...], macs: int,
) -> None:  # fmt: skip
    """The summed letter of blocks: a block needs its own channels, where it is needed itself."""
    batch, letter = letters
    sides = []
    for operand in (a, b):
        found = operand.labels(walk, letter)
        plane = (operand.dim(batch), operand.dim(letter))
        if len(found) != 1 or not set(varying(found[0])) <= set(plane):
            for label in a.labels(walk, letter) + b.labels(walk, letter):
                walk.pin(call, label, "is summed over together with another axis")
            return
        sides.append((operand, found[0], plane))
    rows, dead = [], torch.zeros(1, dtype=torch.bool)
    for operand, label, (n, k) in sides:
        shape = [label.size(d) if d != n else gate.numel() for d in range(label.dim())]
        rows.append(rows_of(label.expand(shape), (n,)))
        zeros = _zeros(walk, operand, label) if walk.with_facts else None
        if zeros is not None:
            dead = dead | rows_of(zeros.reshape(label.shape).expand(shape), (n,))
        assert rows[-1].size(1) == operand.tensor.size(k)
    walk.system.same(rows[0], rows[1], call.site)
    first = walk.firsts(gate)
    inputs = rows[0][first]
    silent = dead[first].reshape(-1) if dead.dim() > 1 else None
    gates = gate[first].repeat_interleave(inputs.size(1))
    walk.system.flow.append(
        Read(inputs.reshape(-1), outputs, None, silent, None, macs, 0, call.site, gates)
    )


def _zeros(walk: Stream, operand: Operand, label: Tensor) -> Tensor | None:
    """Which atoms of a label are known to be zero, flat."""
    value = walk.value(operand.tensor)
    facts = value.facts if value.data is None else walk.slices(value.data)
    zeros = None if facts is None else zero_at(facts, label)
    return zeros.reshape(-1) if zeros is not None and bool(zeros.any()) else None


def _name(walk: Stream, tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    labels = walk.value(tensor).labels
    axis = walk.axis_of(labels[0]) if len(labels) == 1 else None
    return axis.owner if axis is not None and axis.owner in walk.params else None


def experts(walk: Stream, call: Call) -> None:
    """Rows, each multiplied with the weight of one of several experts: which, is not known."""
    x, weights = call.tensors[:2]
    if (x.dim(), weights.dim()) != (2, 3) or call.arg("bias") is not None:
        walk.leave(call, "multiplies groups of its own")
        return
    for label in Operand(weights, "ekn").labels(walk, "e"):
        walk.pin(call, label, "any of the experts may be chosen")
    a, b = Operand(x, "tk"), Operand(weights, "ekn")
    aligned = call.op._schema.name == "aten::_grouped_mm"
    for label in (*b.labels(walk, "k"), *b.labels(walk, "n")) if aligned else ():
        walk.system.multiples.append(Multiple(label.reshape(-1), ALIGNED // x.element_size()))
    meet(walk, call, a, b, "tn", None, padded=True, macs=x.numel() * weights.size(2))


RULES: dict[str, Rule] = {
    "aten::linear": linear,
    "aten::mm": contract("ik,kj->ij"),
    "aten::addmm": contract("ik,kj->ij", bias="self"),
    "aten::bmm": contract("nik,nkj->nij"),
    "aten::baddbmm": contract("nik,nkj->nij", bias="self"),
    "aten::mv": contract("ik,k->i"),
    "aten::dot": contract("k,k->"),
    "aten::_grouped_mm": experts,
    "transformers::grouped_mm_fallback": experts,
}
