"""Contractions: an equation says which dims meet; the summed one is a read.

The rows of the table are equations in einsum letters; `convolution` is "bi*,oi*->bo*".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import along, moved, varying
from demp_fx.channels.stream import STRUCTURE, Rule, Shape, Stream
from demp_fx.channels.system import Fold, Read
from demp_fx.channels.value import Call

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a contraction: its dims by letter, and its labels by letter."""

    tensor: Tensor
    letters: str

    def labels(self, walk: Stream, letter: str) -> list[Tensor]:
        """Its labels that vary on a letter's dim."""
        d = self.letters.find(letter)
        return [label for label in walk.value(self.tensor).labels if d in varying(label)]

    def single(self, walk: Stream, letter: str) -> Tensor | None:
        """Its one label on a letter, where that label varies nowhere else (1-D)."""
        found = self.labels(walk, letter)
        if len(found) == 1 and len(varying(found[0])) == 1:
            return found[0].reshape(-1)
        return None


def contract(equation: str, bias: str | None = None) -> Rule:
    """The rule of a contraction of two operands; `bias` names the argument added to the result."""
    left, right, result = equation.replace("->", ",").split(",")

    def rule(walk: Stream, call: Call) -> None:
        tensors = [t for t in call.tensors if bias is None or t is not call.arg(bias)]
        a, b = Operand(tensors[0], left), Operand(tensors[1], right)
        meet(walk, call, a, b, result, call.arg(bias) if bias is not None else None)

    return rule


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
    labels: dict[tuple[int, ...], Tensor] = {}
    for operand in (a, b):
        dims = {d: place[x] for d, x in enumerate(operand.letters) if x in place}
        for label in walk.value(operand.tensor).labels:
            kept = moved(label, dims, out.dim())
            if kept is None:
                continue
            key = varying(kept)
            if key in labels:
                walk.system.same(labels[key], kept, call.site)
            else:
                labels[key] = kept
    for letter in set(a.letters) & set(b.letters) & set(result):
        _shared(walk, call, a, b, letter)
    if bias is not None:
        _bias(walk, call, labels, bias, out)
    read = None
    for letter in (set(a.letters) & set(b.letters)) - set(result):
        macs = macs or out.numel() * a.tensor.size(a.letters.find(letter))
        read = _read(walk, call, a, b, letter, tuple(labels.values()), bias, padded, macs)
    walk.system.macs += macs
    facts = _constants(walk, a, b, result, bias, padded, read) if walk.with_facts else None
    walk.give(out, tuple(labels.values()), facts)


def _shared(walk: Stream, call: Call, a: Operand, b: Operand, letter: str) -> None:
    """A batch letter: both operands must have its channels, or neither may lose any."""
    for one, other in ((a, b), (b, a)):
        if one.labels(walk, letter) and not other.labels(walk, letter):
            for label in one.labels(walk, letter):
                walk.pin(call, label, "meets a value whose channels no parameter makes")


def _bias(
    walk: Stream, call: Call, labels: dict[tuple[int, ...], Tensor], bias: Tensor, out: Tensor
) -> None:
    rank, d = out.dim(), 1 if call.op._schema.name == "aten::convolution" else out.dim() - 1
    for label in walk.value(bias).labels:
        label = along(label, rank, d) if bias.dim() == 1 else label
        if varying(label) in labels:
            walk.system.same(labels[varying(label)], label, call.site)
        else:
            walk.pin(call, label, "is added to channels that no parameter makes")


def _read(
    walk: Stream, call: Call, a: Operand, b: Operand, letter: str, outputs: tuple[Tensor, ...],
    bias: Tensor | None, padded: bool, macs: int,
) -> Read | None:  # fmt: skip
    """The summed letter: both operands' channels are one, and the result needs those not dead."""
    one, other = a.single(walk, letter), b.single(walk, letter)
    if one is None or other is None:
        reason = "reads channels that no parameter makes, such as the network's input"
        if a.labels(walk, letter) and b.labels(walk, letter):
            reason = "is summed over together with another axis"
        for label in a.labels(walk, letter) + b.labels(walk, letter):
            walk.pin(call, label, reason)
        return None
    walk.system.same(one, other, call.site)
    facts = walk.value(a.tensor).facts
    size = one.numel()
    silent, fold = None, None
    if walk.with_facts:
        facts = facts.along(a.letters.find(letter), size) if facts is not None else None
        weight = walk.value(b.tensor).data
        silent = empty_slices(weight, b.letters.find(letter)) if weight is not None else None
        axis = walk.axis_of(other)
        if axis is not None and axis.owner in walk.params and weight is not None:
            fold = Fold(axis.owner, axis.dim, _name(walk, bias), padded)
    found = tuple(label.reshape(-1) for label in outputs)
    weights = b.tensor.numel() if walk.value(b.tensor).data is not None else 0
    read = Read(one, found, facts, silent, fold, macs, weights, call.site)
    walk.system.flow.append(read)
    return read


def _name(walk: Stream, tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    labels = walk.value(tensor).labels
    axis = walk.axis_of(labels[0]) if len(labels) == 1 else None
    return axis.owner if axis is not None and axis.owner in walk.params else None


def empty_slices(weight: Tensor, dim: int) -> Tensor | None:
    """Which slices of a weight along `dim` are all zero; None where none is.

    One number of each slice is looked at first, so that a dense weight costs next to nothing.
    """
    if weight.is_meta or weight.numel() == 0:
        return None
    corner = weight.movedim(dim, 0)
    while corner.dim() > 1:
        corner = corner.select(1, 0)
    index = (corner == 0).nonzero().reshape(-1)
    if index.numel() == 0:
        return None
    empty = torch.zeros(weight.size(dim), dtype=torch.bool)
    empty[index.cpu()] = (
        ~(weight.index_select(dim, index) != 0).movedim(dim, 0).flatten(1).any(1).cpu()
    )
    return empty if bool(empty.any()) else None


def _constants(
    walk: Stream, a: Operand, b: Operand, result: str, bias: Tensor | None, padded: bool,
    read: Read | None,
) -> Facts | None:  # fmt: skip
    """Outputs that depend on constants only: their weights on every unknown input are zero."""
    summed = next(iter((set(a.letters) & set(b.letters)) - set(result)), None)
    kept = next((x for x in b.letters if x in result and x not in a.letters), None)
    weight = walk.value(b.tensor).data
    if summed is None or kept is None or weight is None or weight.is_meta:
        return None
    if any(x in a.letters and x in result for x in b.letters):
        return None
    weight = weight.movedim((b.letters.find(kept), b.letters.find(summed)), (0, 1))
    size = weight.size(1)
    before = walk.value(a.tensor).facts if read is None else read.facts
    if before is not None and read is None:
        before = before.along(a.letters.find(summed), size)
    facts = outputs_known(weight, before, _offset(walk, bias, weight.size(0)), padded)
    return None if facts is None else facts.spread(len(result), result.find(kept))


def _offset(walk: Stream, bias: Tensor | None, size: int) -> Tensor | None:
    if bias is None:
        return torch.zeros(size, dtype=torch.float64)
    facts = walk.value(bias).facts
    if facts is None or facts.known.dim() != 1:
        return None
    return facts.values[0].expand(size)


def outputs_known(
    weight: Tensor, before: Facts | None, offset: Tensor | None, padded: bool
) -> Facts | None:
    """Facts of `weight` (out, in, *kernel) applied to channels with facts `before` (1-D)."""
    if offset is None:
        return None
    known = torch.zeros(weight.size(1), dtype=torch.bool) if before is None else before.known
    blind = (~known).nonzero().reshape(-1).to(weight.device)
    candidates = torch.arange(weight.size(0))
    if blind.numel():
        probe = weight.select(1, int(blind[0])).reshape(weight.size(0), -1).select(1, 0)
        candidates = (probe == 0).nonzero().reshape(-1).cpu()
        if candidates.numel() == 0:
            return None
    rows = weight[candidates.to(weight.device)]
    if blind.numel():
        fine = ~(rows[:, blind] != 0).flatten(1).any(1)
        candidates, rows = candidates[fine.cpu()], rows[fine]
    values = offset[candidates].expand(2, -1)
    if before is not None and bool(before.constant.any()):
        hot = before.constant.nonzero().reshape(-1)
        taps = rows[:, hot.to(weight.device)].cpu().to(torch.float64)
        taps = taps.flatten(2).sum(2) if taps.dim() > 2 else taps
        values = values + before.values[:, hot] @ taps.T
        if padded or bool((before.profile[hot] != 0).any()):
            fine = ~(rows[:, hot.to(weight.device)] != 0).flatten(1).any(1).cpu()
            candidates, values = candidates[fine], values[:, fine]
    result = torch.zeros(weight.size(0), dtype=torch.bool)
    result[candidates] = True
    full = torch.zeros(2, weight.size(0), dtype=torch.float64)
    full[:, candidates] = values
    return Facts.of(result, full)


def convolution(walk: Stream, call: Call) -> None:
    """bi*,oi*->bo*; depthwise it is elementwise on its channels, otherwise grouped it is pinned."""
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    for label in walk.value(weight).labels:
        if varying(label)[0] > 1:
            walk.pin(call, label, STRUCTURE)
    rank = x.dim()
    for label in walk.value(x).labels:
        if max(varying(label), default=0) > 1:
            walk.pin(call, label, "convolution over an axis of channels")
    if groups == 1:
        kernel = "*" * (rank - 2)
        a = Operand(x, "bi" + "?" * (rank - 2))
        b = Operand(weight, ("io" if transposed else "oi") + kernel)
        spatial = transposed or any(p != 0 for p in call.args[4])
        macs = (weight.numel() // weight.size(0)) * (
            x.numel() if transposed else call.outputs[0].numel()
        )
        meet(walk, call, a, b, "bo" + "." * (rank - 2), bias, spatial, macs)
    elif groups == x.size(1) and weight.size(1) == 1 and not transposed:
        depthwise(walk, call)
    else:
        grouped(walk, call)


def depthwise(walk: Stream, call: Call) -> None:
    """Channel c makes outputs c * m ... c * m + m - 1, and nothing else does."""
    x, weight, bias = call.args[:3]
    out = call.outputs[0]
    rank, size, times = x.dim(), x.size(1), weight.size(0) // x.size(1)
    filters = Operand(weight, "o").single(walk, "o")
    source = Operand(x, "bi").single(walk, "i")
    if filters is None:
        walk.give(out, ())
        return
    if source is None:
        walk.pin(call, filters, "convolves channels that no parameter makes")
    else:
        walk.system.same(source.repeat_interleave(times), filters, call.site)
    labels: dict[tuple[int, ...], Tensor] = {(1,): along(filters, rank, 1)}
    if bias is not None:
        _bias(walk, call, labels, bias, out)
    walk.system.macs += out.numel() * (weight.numel() // weight.size(0))
    facts = None
    real = walk.value(weight).data
    offset = _offset(walk, bias, size * times)
    seen = walk.value(x).facts
    if walk.with_facts and real is not None and not real.is_meta and offset is not None:
        before = seen.along(1, size) if seen is not None else None
        facts = _channelwise(real, before, offset, times, any(p != 0 for p in call.args[4]))
    walk.give(out, tuple(labels.values()), None if facts is None else facts.spread(rank, 1))


def _channelwise(
    weight: Tensor, before: Facts | None, offset: Tensor, times: int, padded: bool
) -> Facts | None:
    empty = empty_slices(weight, 0)
    known = torch.zeros(weight.size(0), dtype=torch.bool) if empty is None else empty
    values = offset.expand(2, -1)
    if before is not None:
        before = before.map(lambda t: t.repeat_interleave(times))
        taps = weight.flatten(1).sum(1).cpu().to(torch.float64)
        known = known | (before.zero if padded else before.flat)
        values = values + before.values * taps
    return Facts.of(known, values)


def grouped(walk: Stream, call: Call) -> None:
    """Groups must stay equal in size: their channels are kept."""
    walk.system.macs += call.outputs[0].numel() * (call.args[1].numel() // call.args[1].size(0))
    for t in call.tensors:
        for label in walk.value(t).labels:
            walk.pin(call, label, "grouped convolution")
    walk.give(call.outputs[0], ())


RULES: dict[str, Rule] = {
    "aten::convolution": convolution,
    "aten::mm": contract("ik,kj->ij"),
    "aten::addmm": contract("ik,kj->ij", bias="self"),
    "aten::bmm": contract("nik,nkj->nij"),
    "aten::baddbmm": contract("nik,nkj->nij", bias="self"),
    "aten::mv": contract("ik,k->i"),
    "aten::dot": contract("k,k->"),
}


def _convolution_shape(args: tuple[Any, ...]) -> Tensor:
    """torch's own formula, without its checks of the device and of memory formats."""
    x, weight, _, stride, padding, dilation, transposed, _, groups = args
    space = [
        (n + 2 * pad - gap * (k - 1) - 1) // step + 1
        for n, k, step, pad, gap in zip(
            x.shape[2:], weight.shape[2:], _each(stride, x), _each(padding, x),
            _each(dilation, x), strict=True,
        )
    ]  # fmt: skip
    fits = x.size(1) == weight.size(1) * groups and min(space) > 0
    shape = (x.size(0), weight.size(0), *space)
    if transposed or not fits or not x.is_contiguous():
        shape = aten.convolution.default(*args).shape  # or let torch say what is wrong
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _each(setting: list[int], x: Tensor) -> list[int]:
    return setting * (x.dim() - 2) if len(setting) == 1 else setting


def _product_shape(op: torch._ops.OpOverload, left: int) -> Shape:
    """The shape of a matrix product whose left operand is argument `left`."""

    def shape(args: tuple[Any, ...]) -> Tensor:
        a, b = args[left : left + 2]
        if a.size(-1) != b.size(-2) or a.dtype != b.dtype:
            result: Tensor = op(*args)  # let torch say what is wrong
            return result
        return torch.empty((*a.shape[:-1], b.size(-1)), dtype=a.dtype, device="meta")

    return shape


SHAPES: dict[torch._ops.OpOverload, Shape] = {
    aten.convolution.default: _convolution_shape,
    aten.addmm.default: _product_shape(aten.addmm.default, 1),
    aten.mm.default: _product_shape(aten.mm.default, 0),
    aten.bmm.default: _product_shape(aten.bmm.default, 0),
}
