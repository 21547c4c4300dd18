"""Data movement: the op itself is run on the labels, so that no index algebra is written here.

A movement stays as it is where it still fits a narrower tensor: labelled axes that are permuted,
merged, sliced or joined, or split into blocks. One that repeats or reorders channels does not; the
walk then looks for one `index_select` that does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from demp_fx.channels.blanks import stays_blank
from demp_fx.channels.blocks import nested, without_repeats
from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, compress, repeats, reshaped, varying
from demp_fx.channels.rules.cells import merged
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call, Value

TRIANGLES = {"aten::tril", "aten::triu"}
RESHAPES = {"aten::view", "aten::_unsafe_view", "aten::_reshape_alias"}
REARRANGE = {"aten::flip", "aten::roll", "aten::repeat", "aten::pixel_shuffle", "aten::rot90",
             "aten::pixel_unshuffle", "aten::channel_shuffle", "aten::native_channel_shuffle",
             "aten::_unsafe_view", "aten::unbind", *TRIANGLES}  # fmt: skip
REPEATS = {*RESHAPES, "aten::repeat"}
PICKS = {"aten::index_select", "aten::index"}
PERMUTES = {"aten::t", "aten::transpose", "aten::permute", "aten::unsqueeze", "aten::alias",
            "aten::detach", "aten::numpy_T"}  # fmt: skip
PARTS = {"aten::slice", "aten::split", "aten::split_with_sizes", "aten::narrow", "aten::chunk"}
SLICES = {*PARTS, "aten::select", "aten::unbind"}


def move(walk: Stream, call: Call) -> None:
    """The labels of the result are the op applied to the labels of the operand."""
    if call.op._schema.overload_name == "dtype":  # `view(torch.int64)` is no view of places
        _refuse(walk, call)
        return
    tensor: Tensor = call.args[0]
    value = walk.value(tensor)
    name = call.op._schema.name

    def apply(t: Tensor) -> list[Tensor]:
        return _moved(call, t, tensor)

    walk.moves += 1
    inside = name in TRIANGLES and {tensor.dim() - 2, tensor.dim() - 1}
    results = [
        [label] if inside and not inside & set(varying(label)) else apply(label)
        for label in value.labels
    ]  # a matrix of each channel keeps it
    known = value.facts
    if known is not None and not _stays_in_place(call, known):
        known = Facts.of(known.flat, known.values)
    real: list[Tensor | None] = [None] * len(call.outputs)
    if value.data is not None and call.op.is_view:
        with suppress(RuntimeError):  # of a copy that is laid out as it need not be here
            real = _real(call, value.data)
    if value.data is not None and all(part is None for part in real):
        if call.op.is_view:
            walk.use(call, [value])
        if known is None and walk.with_facts:
            known = walk.slices(value.data)
    facts = _facts(known, apply) if walk.with_facts else None
    for k, out in enumerate(call.outputs):
        found = _kept(walk, call, value, [compress(r[k]) for r in results])
        if name in RESHAPES and not value.table and walk.running.node in walk.running.given:
            found = merged(walk, call, found)
        walk.give(out, found, facts[k] if facts else None, real[k], moved=True)
    if value.blank and call.op.is_view:
        stays_blank(walk, tensor, call.outputs, apply)


def _moved(call: Call, t: Tensor, tensor: Tensor) -> list[Tensor]:
    """The op applied to a label, or to facts, of its operand `tensor`: as small as they are."""
    name = call.op._schema.name
    if name in RESHAPES:
        return [reshaped(t, tensor.shape, call.outputs[0].shape)]
    if name in PICKS and isinstance(call.args[1], int):
        dim, index = call.args[1:3]
        return [t if t.size(dim) == 1 else t.index_select(dim, index)]
    if name in PARTS and t.size(call.arg("dim") or 0) == 1:  # it may be a part without numbers
        return [t] * len(call.outputs)
    if name == "aten::expand":  # likewise
        return [t.reshape((1,) * (call.outputs[0].dim() - t.dim()) + t.shape)]
    if name == "aten::repeat" and not all(call.args[1]):  # it is empty, and has channels
        times = call.args[1]
        gone = [d for d, n in enumerate(times) if n == 0]
        if not set(gone) & {d + len(times) - t.dim() for d in varying(t)}:
            return [compress(t.expand(tensor.shape).repeat([n or 1 for n in times]))]
    whole = t if name in PERMUTES else t.expand(tensor.shape)
    result = call.op(whole, *call.args[1:], **call.kwargs)
    return [result] if isinstance(result, Tensor) else list(result)


def _kept(walk: Stream, call: Call, value: Value, moved: list[Tensor]) -> Labels:
    """Which labels the result has: those of the operand, `moved`, but where narrowing would break
    the movement and nothing else can be done."""
    name, labels = call.op._schema.name, []
    for before, after in zip(value.labels, moved, strict=True):
        if after.numel() <= 1:
            if before.numel() > 1:
                walk.pin(call, after, "a single channel is taken")
                if name in PICKS:  # by its number, which others before it change
                    walk.unfit.append((before, f"{name} rearranges channels"))
            continue
        fitting = fits(walk, before, after, call)
        if not fitting and len(value.labels) > 1 and walk.system.is_fixed(before):
            continue  # it stays anyway: the others need not be moved with it
        if not fitting and not bool(before.all()):  # beside what may be as long as the input
            walk.pin(call, before, f"{name} rearranges channels")
            continue
        labels.append(after)
        walk.merged |= after.numel() > before.numel()
        if len(varying(after)) > 1:
            walk.shaped.append(after)
        if not fitting:
            walk.unfit.append((before, f"{name} rearranges channels"))
    return tuple(labels)


def fits(walk: Stream, before: Tensor, after: Tensor, call: Call) -> bool:
    """Whether a movement of a label survives narrowing with only its sizes changed."""
    name = call.op._schema.name
    old, new = before.reshape(-1), after.reshape(-1)
    width = len(varying(before)), len(varying(after))
    if name == "aten::slice" and (call.arg("step") or 1) != 1:
        return _equal(old, new)
    if width == (1, 1):
        if _equal(old, new):  # numbers that name all of them do not follow
            return name not in PICKS or not _picked(call) & set(varying(before))
        if name in SLICES:
            walk.sliced.add(call.site.node)
            walk.opens |= repeats(before)  # its parts have channels in common
            return _run(old, new)
        a, b = (without_repeats(line.numpy()) for line in (old, new))  # merged with another dim
        return name in REPEATS and np.array_equal(a, b)
    if name in REARRANGE and name not in RESHAPES | SLICES:
        return width[0] == width[1] and _equal(old, new)
    walk.splits |= width[0] == 1
    walk.opens |= width[1] == 1
    return nested(after) is not None


def _picked(call: Call) -> set[int]:
    """The dims along which an index picks."""
    given = call.args[1]
    if isinstance(given, int):
        return {given % call.args[0].dim()}
    return {d for d, index in enumerate(given) if index is not None}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _run(old: Tensor, new: Tensor) -> bool:
    """`new` is a contiguous run of `old`."""
    start = int((old == new[0]).nonzero()[0])
    return _equal(old[start : start + new.numel()], new)


def _stays_in_place(call: Call, facts: Facts) -> bool:
    """Whether constants that are other ones in each place, if there are any, are left where they
    are, as parts of the channels do."""
    name = call.op._schema.name
    if name in ("aten::alias", "aten::detach") or not bool(facts.profile.any()):
        return True
    return name in PARTS and facts.aligned(call.args[0].dim()).known.size(call.arg("dim") or 0) > 1


def _facts(facts: Facts | None, apply: Callable[[Tensor], list[Tensor]]) -> list[Facts] | None:
    if facts is None:
        return None
    known = apply(facts.known)

    def moved(part: Tensor) -> list[Tensor]:
        if any(part.stride()):
            return apply(part)
        return [part.as_strided(t.shape, (0,) * t.dim()) for t in known]  # one number everywhere

    parts = (known, moved(facts.values[0]), moved(facts.values[1]), moved(facts.profile))
    return [compressed(*piece) for piece in zip(*parts, strict=True)]


def compressed(known: Tensor, evaluated: Tensor, trained: Tensor, profile: Tensor) -> Facts:
    """Facts of size 1 along every dim where none varies. Strides are asked before values."""
    parts = [known, evaluated, trained, profile]
    for d in range(known.dim()):
        if known.size(d) > 1:
            first = [t.narrow(d, 0, 1) for t in parts]
            if all(
                t.stride(d) == 0 or bool((t == one).all())
                for t, one in zip(parts, first, strict=True)
            ):
                parts = first
    known, evaluated, trained, profile = parts
    return Facts(known, torch.stack([evaluated, trained]), profile)


def _real(call: Call, data: Tensor) -> list[Tensor | None]:
    result = call.op(data, *call.args[1:], **call.kwargs)
    return [result] if isinstance(result, Tensor) else list(result)


def expand(walk: Stream, call: Call) -> None:
    """What has one entry along a dim gets it many times."""
    move(walk, call)
    x, out = call.args[0], call.outputs[0]
    if walk.running.follows:
        lead = out.dim() - x.dim()
        walk.value(out).image_of = None
        walk.value(out).blank = frozenset(
            d for d, n in enumerate(out.shape) if n > 1 and (d < lead or x.size(d - lead) == 1)
        )


def pixel_shuffle(walk: Stream, call: Call) -> None:
    """Some channels next to each other become the places of one: they go together."""
    move(walk, call)
    walk.opens = walk.splits = True
    walk.unfit, walk.shaped = [], []
    out, labels = call.outputs[0], []
    for label in walk.value(out).labels:
        space = tuple(d for d in varying(label) if d >= out.dim() - 2)
        labels.append(walk.tie(label, space, call))
    walk.relabel(out, tuple(x for x in labels if x.numel() > 1))
    for x in labels:
        if x.numel() == 1:
            walk.pin(call, x, "a single channel is made")


def diagonal(walk: Stream, call: Call) -> None:
    """A diagonal through channels reads as many of them as another dim is long: all of them stay,
    whatever the example's is."""
    x = call.args[0]
    dims = {call.arg(name) % x.dim() for name in ("dim1", "dim2")}
    for label in walk.value(x).labels:
        if dims & set(varying(label)):
            walk.pin(call, label, "is on a diagonal with another axis")
    move(walk, call)


def _restride(walk: Stream, call: Call) -> None:
    """The strides of a tensor are set anew: nothing is moved where its shape stays."""
    value, out = walk.value(call.args[0]), call.outputs[0]
    same = all(
        label.dim() == out.dim()
        and all(n in (1, m) for n, m in zip(label.shape, out.shape, strict=True))
        for label in value.labels
    )
    if not same or call.arg("storage_offset"):
        _refuse(walk, call)
    else:
        walk.give(out, value.labels, value.facts, moved=True)


def _refuse(walk: Stream, call: Call) -> None:
    for label in walk.value(call.tensors[0]).labels:
        walk.pin(call, label, f"{call.op._schema.name} looks through the memory")
    walk.give(call.outputs[0], ())


def roll(walk: Stream, call: Call) -> None:
    """What is rolled as far as the input's size says is at other places for another input: along
    those dims, all places are one."""
    x, rank = call.args[0], call.args[0].dim()
    dims = {d % rank for d in call.arg("dims") or range(rank)}
    value = walk.value(x)
    if walk.running.sized and (value.labels or value.known is not None):
        labels: list[Tensor] = []
        for label in value.labels:
            along = tuple(d for d in varying(label) if d in dims)
            if along == varying(label):
                walk.pin(call, label, "is rolled as far as a size of the input says")
            else:
                labels.append(walk.tie(label, along, call) if along else label)
        known = value.facts
        if known is not None and any(known.aligned(rank).known.size(d) > 1 for d in dims):
            known = Facts.zeros(known.aligned(rank).zero.all(dim=tuple(dims), keepdim=True))
        walk.give(call.outputs[0], tuple(labels), known)
        return
    move(walk, call)


RULES: dict[str, Rule] = {
    **dict.fromkeys(REARRANGE, move),
    "aten::roll": roll,
    "aten::pixel_shuffle": pixel_shuffle,
    "aten::diagonal": diagonal,
    "aten::expand": expand,
    "aten::as_strided_": _restride,
    "aten::as_strided": _refuse,
}
