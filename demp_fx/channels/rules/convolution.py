"""Convolution: plain, depthwise, grouped and transposed, over any number of dims."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.blanks import adopt
from demp_fx.channels.blocks import repeats_along
from demp_fx.channels.constraints import Blocks, Grouping, Read
from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, along, varying
from demp_fx.channels.rules.contract import add_bias, meet
from demp_fx.channels.rules.known import offset_of, zero_at
from demp_fx.channels.rules.operand import Operand
from demp_fx.channels.rules.samplewise import samples_in, samplewise
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call
from demp_fx.channels.values import STRUCTURE

aten = torch.ops.aten


def convolution(walk: Stream, call: Call) -> None:
    """bi*,oi*->bo*; depthwise it is elementwise on its channels, grouped it works in blocks."""
    x, weight, transposed, groups = *call.args[:2], call.args[6], call.args[8]
    if groups > 1 and (samples := samples_in(walk, call)) > 1:
        samplewise(walk, call, samples, convolution)
        return
    value = walk.value(x)
    _kernel_aside(walk, call)
    aside: Labels = ()
    if any(max(varying(label)) > 1 for label in value.labels):
        aside = _set_aside(walk, call)
    if groups == 1:
        dense(walk, call)
    elif (
        groups == x.size(1)
        and weight.size(1) == 1
        and not transposed
        and (groups == weight.size(0) or any(1 in varying(label) for label in value.labels))
    ):
        depthwise(walk, call)
    else:
        grouped(walk, call)
    if aside:
        walk.relabel(call.outputs[0], (*walk.value(call.outputs[0]).labels, *aside))
    if value.labels:  # else it may have taken those of the weight, as a first state does
        walk.relabel(x, value.labels)


def _kernel_aside(walk: Stream, call: Call) -> None:
    """Positions of the kernel stay, whatever else is in an axis with them."""
    weight, labels = call.args[1], []
    for label in walk.value(weight).labels:
        dims = varying(label)
        if dims[0] > 1:
            walk.pin(call, label, STRUCTURE)
        elif dims[-1] > 1:
            label = walk.tie(label, tuple(d for d in dims if d > 1), call)
        labels.append(label)
    walk.relabel(weight, tuple(labels))


def dense(walk: Stream, call: Call) -> None:
    """Every channel makes every output."""
    x, weight, bias = call.args[:3]
    kernel, transposed = x.dim() - 2, call.args[6]
    a = Operand(x, "bi" + "?" * kernel)
    b = Operand(weight, ("io" if transposed else "oi") + "*" * kernel)
    spatial = transposed or _padded(walk, call)
    through = x if transposed else call.outputs[0]
    macs = (weight.numel() // weight.size(0)) * through.numel()
    meet(walk, call, a, b, "bo" + "." * kernel, bias, spatial, macs)


def _padded(walk: Stream, call: Call) -> bool:
    """Whether there are zeros around this input, or may be around another one."""
    return any(p != 0 for p in call.args[4]) or walk.running.sized


def _set_aside(walk: Stream, call: Call) -> Labels:
    """Take the labels off the dims that the kernel moves along; those that the result has there.

    Where it only steps from one index to the next, they are the same. Else each index of the result
    needs all of the input, whose zeros can be put back in front; behind it, indices can be picked.
    """
    x, out = call.args[0], call.outputs[0]
    left, behind = [], []
    for label in walk.value(x).labels:
        dims = tuple(d for d in varying(label) if d > 1)
        if not dims:
            left.append(label)
        elif all(_steps(call, d) for d in dims) and varying(label) == dims:
            behind.append(label)
        elif not bool(label.all()):  # the result has no channels there, but may be any length
            walk.pin(call, label, "convolution over an axis of channels")
        elif varying(label) == dims[:1] and not repeats_along(label, dims[0]):
            walk.opens = walk.splits = True
            fresh = walk.system.fresh(call.site.node, -1, out.size(dims[0])).atoms
            for atoms in (label, fresh):
                walk.pin(call, atoms, "convolution over an axis of channels", (fresh,))
            behind.append(along(fresh, out.dim(), dims[0]))
        else:
            line = walk.tie(label, dims, call)
            left += [line] if line.numel() > 1 else []
            if line.numel() == 1:
                walk.pin(call, line, "convolution over an axis of channels")
    walk.relabel(x, tuple(left))
    return tuple(behind)


def _steps(call: Call, dim: int) -> bool:
    """Whether the kernel has one tap along a dim, and neither skips nor pads there."""
    weight: Tensor = call.args[1]
    stride, padding = (s[dim - 2] if len(s) > 1 else s[0] for s in call.args[3:5])
    return weight.size(dim) == 1 and stride == 1 and padding == 0


def _source(walk: Stream, call: Call) -> Tensor | None:
    """The channels of the input, if they have one name each. Where there are others in each sample
    (of the heads, which stand in the batch), what is at one place in all of them is one."""
    found = Operand(call.args[0], "bi").labels(walk, "i")
    if len(found) != 1:
        return None
    return walk.tie(found[0], tuple(d for d in varying(found[0]) if d != 1), call).reshape(-1)


def depthwise(walk: Stream, call: Call) -> None:
    """Channel c makes outputs c * m ... c * m + m - 1, and nothing else does."""
    x, weight, bias = call.args[:3]
    out = call.outputs[0]
    rank, size, times = x.dim(), x.size(1), weight.size(0) // x.size(1)
    filters = Operand(weight, "o").single(walk, "o")
    source = _source(walk, call)
    if filters is None and source is not None and 0 in walk.value(weight).blank:
        filters = source.repeat_interleave(times)  # the same kernel for as many as there are
        adopt(walk, weight, along(filters, weight.dim(), 0))
    if filters is None:
        for label in walk.value(x).labels:
            walk.pin(call, label, "is convolved with weights that are no parameter")
        walk.give(out, ())
        return
    if source is None:
        walk.pin(call, filters, "convolves channels that no parameter makes")
    else:
        walk.system.same(source.repeat_interleave(times), filters, call.site)
    labels = [along(filters, rank, 1)]
    if bias is not None:
        add_bias(walk, call, labels, bias, out)
    walk.system.multiply(out.numel() * (weight.numel() // weight.size(0)), filters)
    facts = None
    offset = offset_of(walk, bias, size * times)
    seen = walk.value(x).facts
    if walk.with_facts and offset is not None:
        before = seen.along(1, size) if seen is not None else None
        facts = _channelwise(walk, weight, before, offset, times, _padded(walk, call))
    walk.give(out, tuple(labels), None if facts is None else facts.spread(rank, 1))


def _channelwise(
    walk: Stream, weight: Tensor, before: Facts | None, offset: Tensor, times: int, padded: bool
) -> Facts | None:
    """Zero filters leave the bias. Of a weight that is computed, no other number is known."""
    real, rows = walk.value(weight).data, walk.value(weight).facts
    real = None if real is None or real.is_meta else real
    known = torch.zeros(weight.size(0), dtype=torch.bool)
    if real is not None:
        empty = walk.empty(real, 0)
        known = known if empty is None else empty
    elif rows is not None:
        known = zero_at(rows, along(known, weight.dim(), 0)).reshape(-1)
    values = offset.expand(2, -1)
    if before is not None:
        before = before.map(lambda t: t.repeat_interleave(times))
        known = known | (before.zero if padded or real is None else before.flat)
        if real is not None:
            taps = real.flatten(1).sum(1).cpu().to(torch.float64)
            values = values + before.values * taps
    return Facts.of(known, values)


def grouped(walk: Stream, call: Call) -> None:
    """Blocks of channels make blocks of channels: each may lose others, but as many of them.

    Which inputs a filter has then differs from block to block (`Grouping`).
    """
    x, weight, bias = call.args[:3]
    out, groups, transposed = call.outputs[0], call.args[8], call.args[6]
    walk.opens = walk.splits = True
    for label in walk.value(weight).labels:
        if varying(label) == (1,):  # which of them stay differs from block to block
            walk.pin(call, label, STRUCTURE)
    macs = (x if transposed else out).numel() * (weight.numel() // weight.size(0))
    walk.system.multiply(macs, *walk.value(x).labels, *walk.value(weight).labels)
    source = _source(walk, call)
    filters = Operand(weight, "o").single(walk, "o")
    if source is None and not any(1 in varying(label) for label in walk.value(x).labels):
        source = walk.system.fresh(call.site.node, -1, x.size(1)).atoms  # for as long as it is here
        walk.pin(call, source, "grouped convolution of channels that no parameter makes")
    name, consumer = walk.name_of(weight), None
    if name is None:  # a weight that is computed: what a filter loses is taken out on the way
        name, consumer = walk.maker(weight), call.site.node
    produced = filters
    if transposed:
        produced = walk.system.fresh(call.site.node, -1, out.size(1)).atoms
        filters, inner = source, filters
        if source is not None and inner is not None:
            walk.system.same(source, inner, call.site)
    if source is None or filters is None or produced is None or name is None:
        for t in call.tensors:
            for label in walk.value(t).labels:
                walk.pin(call, label, "grouped convolution of channels that no parameter makes")
        walk.give(out, ())
        return
    labels = [along(produced, x.dim(), 1)]
    if bias is not None:
        add_bias(walk, call, labels, bias, out)
    ins, outs = source.reshape(groups, -1), produced.reshape(groups, -1)
    gate = walk.rows(ins[:, :1])
    for block in (ins, outs):
        walk.system.blocks.append(Blocks(block, call.site))
        walk.system.link(block, gate, call.site)
    first, second = (ins, outs) if transposed else (outs, ins)
    walk.system.groupings.append(Grouping(name, first, second, consumer))
    silent = _unheard(walk, x, weight, source, groups, transposed) if walk.with_facts else None
    walk.system.flow.append(
        Read(source, (produced,), None, silent, None, 0, weight.numel(), call.site,
             gate.repeat_interleave(ins.size(1)))
    )  # fmt: skip
    offset = offset_of(walk, bias, out.size(1)) if walk.with_facts else None
    known = None if offset is None else _of_groups(walk, call, silent, offset)
    walk.give(out, tuple(labels), None if known is None else known.spread(x.dim(), 1))


def _of_groups(walk: Stream, call: Call, silent: Tensor | None, offset: Tensor) -> Facts | None:
    """Outputs that are the bias: where a filter is zero, and where nothing goes into a group."""
    weight, groups, transposed = call.args[1], call.args[8], call.args[6]
    known = (_silent(walk, weight, groups, offset) if transposed
             else _channelwise(walk, weight, None, offset, 1, padded=True))  # fmt: skip
    if silent is None:
        return known
    empty = silent.reshape(groups, -1).all(1).repeat_interleave(offset.numel() // groups)
    return Facts.of(empty if known is None else empty | known.flat, offset.expand(2, -1))


def _unheard(
    walk: Stream, x: Tensor, weight: Tensor, source: Tensor, groups: int, transposed: bool
) -> Tensor | None:
    """Inputs that are zero, or that no filter of their block hears."""
    facts, real = walk.value(x).facts, walk.value(weight).data
    zero = None if facts is None else zero_at(facts, along(source, x.dim(), 1)).reshape(-1)
    if real is None or real.is_meta:
        return zero
    if transposed:
        unheard = walk.empty(real, 0)
    else:
        columns = real.unflatten(0, (groups, -1)).transpose(1, 2)  # by block: inputs, then filters
        empty = columns[:, :, 0].flatten(2).eq(0).all(2)
        if bool(empty.any()):  # the first filter tells of most that they are not
            empty = columns.flatten(2).eq(0).all(2)
        unheard = empty.reshape(-1).cpu()
    return zero if unheard is None else unheard if zero is None else zero | unheard


def _silent(walk: Stream, weight: Tensor, groups: int, offset: Tensor) -> Facts | None:
    """Outputs of a transposed convolution whose filters are zero: they are the bias."""
    real = walk.value(weight).data
    if real is None or real.is_meta:
        return None
    filters = real.unflatten(0, (groups, -1)).movedim(2, 1)  # by group: outputs, then inputs
    return Facts.of(~(filters != 0).flatten(2).any(2).reshape(-1).cpu(), offset.expand(2, -1))


RULES: dict[str, Rule] = {"aten::convolution": convolution}
