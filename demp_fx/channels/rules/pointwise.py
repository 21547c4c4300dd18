"""Elementwise ops: operands are aligned by broadcasting, and what stands on one place is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from demp_fx.channels.blanks import adopt, adopts, origin, stays_blank
from demp_fx.channels.blocks import outer_to_inner, rows_of
from demp_fx.channels.facts import Facts, agreed
from demp_fx.channels.labels import Labels, varying
from demp_fx.channels.rules.elementwise import PRODUCTS, constants
from demp_fx.channels.rules.signs import never_positive, rectified
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call

# Ops that return their input as it is, in another dtype, memory or wrapper.
COPIES = {"aten::clone", "aten::_to_copy", "aten::detach", "aten::alias", "aten::detach_"}
# Elementwise, though the dispatcher does not say so, or did not in torch 2.6.
UNTAGGED = {"aten::hardswish", "aten::hardswish_", "aten::_prelu_kernel", "aten::native_dropout",
            "aten::log_sigmoid_forward", "aten::rrelu_with_noise", "aten::complex",
            "aten::polar", "aten::masked_fill", "aten::leaky_relu", "aten::leaky_relu_",
            "aten::ldexp", "aten::_conj_physical"}  # fmt: skip
# Autograd functions of other packages that are elementwise, by class.
FUNCTIONS = {f"{home}.activations_me.{name}{kind}"
             for home, kind in (("timm.layers", "AutoFn"), ("geffnet.activations", "JitAutoFn"))
             for name in ("Swish", "Mish", "HardSigmoid", "HardSwish", "HardMish")}  # fmt: skip
FUNCTIONS |= {"efficientnet_pytorch.utils.SwishImplementation"}


def pointwise(walk: Stream, call: Call) -> None:
    """Unify the labels of all tensor operands; constants go through the op itself."""
    out = call.outputs[0]
    labels = aligned(walk, call, out)
    facts = constants(walk, call, out) if walk.with_facts else None
    if len(call.tensors) == 1 and len(labels) == 1 and len(varying(labels[0])) == 1:
        walk.activations[call.site.node] = varying(labels[0])[0]
    facts = rectified(walk, call, facts) if walk.with_facts else None
    sinking = never_positive(walk, call) if walk.with_facts else None
    for other in call.outputs:
        walk.give(other, labels if other.shape == out.shape else (), facts)
    walk.value(out).never_positive = sinking
    _stays_blank(walk, call, out)


def _stays_blank(walk: Stream, call: Call, out: Tensor) -> None:
    """An image of what holds the same along an axis does so, too, of any number of its images."""
    x = call.tensors[0]
    if x is not out and walk.value(x).blank:
        whole = origin(walk, x)
        if all(t is x or (whole is not None and origin(walk, t) is whole) for t in call.tensors):
            stays_blank(walk, x, [out], lambda t: [t])


def aligned(walk: Stream, call: Call, out: Tensor) -> Labels:
    """The labels of the result of an elementwise op, every operand's tied to them."""
    rank = out.dim()
    adopted(walk, call.tensors, rank)
    operands = [(t, walk.value(t).labels) for t in call.tensors]
    merged: dict[tuple[int, ...], Tensor] = {}
    made: set[tuple[int, ...]] = set()  # by something else than a table of the model's
    tables = [v.table or v.data is not None for v in map(walk.value, call.tensors)]
    for (_, labels), table in zip(operands, tables, strict=True):
        for label in labels:
            label = _aligned(label, rank)
            key = varying(label)
            made |= set() if table else {key}
            if key in merged:
                walk.system.same(merged[key], label, call.site)
                if len(key) > 1 and outer_to_inner(merged[key]) != outer_to_inner(label):
                    walk.pin(call, label, "meets blocks that are nested in another order")
            elif key:
                merged[key] = label
    if not merged:
        return ()
    covered = set()
    for tensor, labels in operands:
        lead = rank - tensor.dim()
        keys = {tuple(d + lead for d in varying(label)) for label in labels}
        for key, label in merged.items():
            full = tuple(d for d in key if d >= lead and tensor.size(d - lead) > 1)
            if key in keys or not full or any(set(full) < set(k) for k in keys):
                continue
            within = [k for k in keys if set(k) <= set(full) and set(k) < set(key)]
            if len(within) == 1:
                rest = tuple(d for d in full if d not in within[0])
                line = walk.tie(label, rest, call)
                _blockwise(walk, call, line, merged[within[0]], within[0])
                covered.add(within[0])
            elif set(key) == set(full) and sum(map(len, within)) == len(key):
                for one in within:  # one along the blocks, and one in them
                    _blockwise(walk, call, label, merged[one], one)
                    covered.add(one)
            else:
                walk.pin(call, label, "meets a value whose channels no parameter makes")
                if not all(tables) and key not in made and not _names(walk, call, label):
                    covered.add(key)  # positions, and no channels
    return tuple(label for key, label in merged.items() if key not in covered)


def _names(walk: Stream, call: Call, label: Tensor) -> bool:
    """Whether a label is that of a scale, whose zeros are then worth knowing: channels that no
    parameter makes have its names. They stay, but whoever reads them may do without some."""
    scales = call.op._schema.name in PRODUCTS and any(
        tensor.numel() == label.numel()
        and any(label.numel() == own.numel() for own in walk.value(tensor).labels)
        and (id(tensor) in walk.names or walk.running.is_whole(tensor))
        for tensor in call.tensors
    )
    walk.opens |= scales
    return scales


def adopted(walk: Stream, operands: Sequence[Tensor], rank: int, aside: int | None = None) -> None:
    """Where an operand holds the same along an axis for as many channels as it meets (a constant,
    or what was expanded), it takes their labels; but none on the dim `aside`."""
    if not any(walk.value(tensor).blank for tensor in operands):
        return
    found = {
        varying(label): label
        for tensor in operands
        for label in (_aligned(x, rank) for x in walk.value(tensor).labels)
        if aside is None or aside not in varying(label)
    }
    for tensor in operands:
        value, lead = walk.value(tensor), rank - tensor.dim()
        own = {d for label in value.labels for d in varying(label)}
        flat = {d + lead for d in value.blank - own if tensor.size(d) > 1}
        new = [x.reshape(x.shape[lead:]) for key, x in found.items() if key and set(key) <= flat]
        new = [x for x in new if adopts(walk, tensor, x)]
        if new and len({d for x in new for d in varying(x)}) == sum(len(varying(x)) for x in new):
            adopt(walk, tensor, *new)


def _aligned(label: Tensor, rank: int) -> Tensor:
    return label.reshape((1,) * (rank - label.dim()) + label.shape)


def _blockwise(
    walk: Stream, call: Call, blocks: Tensor, other: Tensor, dims: tuple[int, ...]
) -> None:
    """Blocks meet a value with channels on some of their dims only.

    One a block (a scale of each head): they survive together. One for each place in a block: what
    is at the same place in all blocks is one.
    """
    order = outer_to_inner(blocks)
    if varying(blocks) == dims:
        walk.system.same(blocks, other, call.site)
    elif set(order[: len(dims)]) == set(dims):
        walk.link(rows_of(blocks, dims), rows_of(other, dims)[:, 0], call.site)
    else:
        rest = tuple(d for d in order if d not in dims)
        walk.system.same(walk.tie(blocks, rest, call), other, call.site)


def glu(walk: Stream, call: Call) -> None:
    """The first half, gated by the second one: their channels are the same."""
    x, out = call.args[0], call.outputs[0]
    dim = (call.arg("dim") if call.arg("dim") is not None else -1) % x.dim()
    size, labels = out.size(dim), []
    for label in walk.value(x).labels:
        if label.size(dim) > 1:
            value, gate = label.narrow(dim, 0, size), label.narrow(dim, size, size)
            walk.system.same(value, gate, call.site)
            label = value
        labels.append(label)
    facts = walk.value(x).facts if walk.with_facts else None
    if facts is not None:
        facts = facts.map(lambda t: t.narrow(dim, 0, size) if t.size(dim) > 1 else t)
        facts = Facts.of(facts.zero, facts.values)
    walk.give(out, tuple(labels), facts)


def copy(walk: Stream, call: Call) -> None:
    """The result is the operand, rounded where its dtype is another one."""
    value, out = walk.value(call.tensors[0]), call.outputs[0]
    facts, data = value.facts if walk.with_facts else None, value.data
    if out.dtype != call.tensors[0].dtype:
        data, facts = None, _rounded(facts, out)
    walk.moves += 1
    walk.give(out, value.labels, facts, data)
    _stays_blank(walk, call, out)


def overwrite(walk: Stream, call: Call) -> None:
    """`x.copy_(source)`: elementwise. Nothing of what `x` held is left, though another input may
    leave some (`x[:, :length] = source`)."""
    out, source = call.args[:2]
    labels = aligned(walk, call, out)
    facts, before = walk.value(source).facts if walk.with_facts else None, walk.value(out).facts
    facts = _rounded(facts, out) if out.dtype != source.dtype else facts
    whole = out.nbytes == out.untyped_storage().nbytes()  # what is a part here is one anywhere
    if walk.running.sized and whole and facts is not None:
        facts = None if before is None else agreed(before, facts)
    walk.give(out, labels, None if facts is None else facts.aligned(out.dim()))


def _rounded(facts: Facts | None, out: Tensor) -> Facts | None:
    """Facts of numbers that are now of another dtype."""
    if facts is None or bool(facts.profile.any()):
        return None
    return Facts.of(facts.known, facts.values.to(out.dtype).real.to(torch.float64))


RULES: dict[str, Rule] = {
    "aten::glu": glu,
    "aten::copy_": overwrite,
    **dict.fromkeys(UNTAGGED | FUNCTIONS, pointwise),
    **dict.fromkeys(COPIES, copy),
}
