"""Data movement: the op itself is run on the labels, so that no index algebra is written here.

A movement stays as it is where it still fits a narrower tensor: labelled axes that are permuted,
merged, sliced or joined, or split into blocks. One that repeats or reorders channels does not; the
walk then looks for one `index_select` that does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.blocks import nested, rows_of
from demp_fx.channels.facts import Facts, same_place
from demp_fx.channels.labels import compress, reshaped, varying
from demp_fx.channels.stream import STRUCTURE, Rule, Shape, Stream
from demp_fx.channels.value import Call

RESHAPES = {"aten::view", "aten::_unsafe_view", "aten::_reshape_alias"}
REARRANGE = {"aten::flip", "aten::roll", "aten::repeat", "aten::pixel_shuffle", "aten::rot90",
             "aten::pixel_unshuffle", "aten::channel_shuffle", "aten::native_channel_shuffle",
             "aten::_unsafe_view", "aten::unbind", "aten::tril", "aten::triu"}  # fmt: skip
REPEATS = {*RESHAPES, "aten::repeat"}
PICKS = {"aten::index_select", "aten::index"}
SLICES = {"aten::slice", "aten::split", "aten::split_with_sizes", "aten::select", "aten::narrow",
          "aten::unbind", "aten::chunk"}  # fmt: skip


def move(walk: Stream, call: Call) -> None:
    """The labels of the result are the op applied to the labels of the operand."""
    if call.op._schema.overload_name == "dtype":  # `view(torch.int64)` is no view of places
        _refuse(walk, call)
        return
    tensor: Tensor = call.args[0]
    value = walk.value(tensor)
    name = call.op._schema.name

    def apply(t: Tensor) -> list[Tensor]:
        with walk.silently():
            if name in RESHAPES:
                return [reshaped(t, tensor.shape, call.outputs[0].shape)]
            if name in PICKS and isinstance(call.args[1], int):
                dim, index = call.args[1:3]
                return [t if t.size(dim) == 1 else t.index_select(dim, index)]
            result = call.op(t.expand(tensor.shape), *call.args[1:], **call.kwargs)
        return [result] if isinstance(result, Tensor) else list(result)

    walk.moves += 1
    results = [apply(label) for label in value.labels]
    facts = _facts(value.facts, apply, len(call.outputs)) if walk.with_facts else None
    real: list[Tensor | None] = [None] * len(call.outputs)
    if value.data is not None and call.op.is_view:
        real = list(_real(call, value.data))
    for k, out in enumerate(call.outputs):
        labels = []
        for before, after in zip(value.labels, (compress(r[k]) for r in results), strict=True):
            if after.numel() <= 1:
                if before.numel() > 1:
                    walk.pin(call, after, "a single channel is taken")
                continue
            labels.append(after)
            walk.merged |= after.numel() > before.numel()
            if len(varying(after)) > 1:
                walk.shaped.append(after)
            if not fits(walk, before, after, call):
                walk.unfit.append((before, f"{name} rearranges channels"))
        walk.give(out, tuple(labels), facts[k] if facts else None, real[k], moved=True)


def fits(walk: Stream, before: Tensor, after: Tensor, call: Call) -> bool:
    """Whether a movement of a label survives narrowing with only its sizes changed."""
    name = call.op._schema.name
    old, new = before.reshape(-1), after.reshape(-1)
    width = len(varying(before)), len(varying(after))
    if name == "aten::slice" and (call.arg("step") or 1) != 1:
        return _equal(old, new)
    if width == (1, 1):
        if _equal(old, new):
            return True
        if name in SLICES:
            walk.sliced.add(call.site.node)
            return _run(old, new)
        short, long = sorted((old, new), key=Tensor.numel)
        return name in REPEATS and long.numel() % short.numel() == 0 and _repeats(short, long)
    if name in REARRANGE and name not in RESHAPES | SLICES:
        return width[0] == width[1] and _equal(old, new)
    walk.splits |= width[0] == 1
    walk.opens |= width[1] == 1
    return nested(after) is not None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _run(old: Tensor, new: Tensor) -> bool:
    """`new` is a contiguous run of `old`."""
    start = int((old == new[0]).nonzero()[0])
    return _equal(old[start : start + new.numel()], new)


def _repeats(old: Tensor, new: Tensor) -> bool:
    """`new` is `old` merged with a dim outside or inside of it."""
    times = new.numel() // old.numel()
    return _equal(old.repeat_interleave(times), new) or _equal(old.repeat(times), new)


def _facts(
    facts: Facts | None, apply: Callable[[Tensor], list[Tensor]], count: int
) -> list[Facts | None] | None:
    if facts is None:
        return None
    known, profile = apply(facts.known), apply(facts.profile)
    values = [apply(facts.values[mode]) for mode in (0, 1)]
    return [
        _compressed(Facts(known[k], torch.stack([values[0][k], values[1][k]]), profile[k]))
        for k in range(count)
    ]


def _compressed(facts: Facts) -> Facts:
    """Size 1 along every dim where no fact varies."""
    for d in range(facts.known.dim()):
        if facts.known.size(d) > 1:
            first = facts.map(lambda t, d=d: t.narrow(d, 0, 1))  # type: ignore[misc]
            if (
                bool((facts.known == first.known).all())
                and bool((facts.profile == first.profile).all())
                and bool((facts.values == first.values).all())
            ):
                facts = first
    return facts


def _real(call: Call, data: Tensor) -> list[Tensor]:
    result = call.op(data, *call.args[1:], **call.kwargs)
    return [result] if isinstance(result, Tensor) else list(result)


def cat(walk: Stream, call: Call) -> None:
    """Join labels along the dim of the join; a piece without any leaves its places bare (0)."""
    tensors, out = call.tensors, call.outputs[0]
    tensors = [t for t in tensors if t.dim() == out.dim()]
    dim = (call.arg("dim") or 0) % out.dim()
    keys = {varying(label) for t in tensors for label in walk.value(t).labels}
    for t in tensors:  # a dim that two axes were merged into has two labels, a join has one
        found = [varying(label) for label in walk.value(t).labels]
        for label in walk.value(t).labels:
            if found.count(varying(label)) > 1:
                walk.pin(call, label, "is joined with channels of another axis merged in")
    labels = []
    for key in sorted(keys):
        pieces = [_piece(walk, t, key) for t in tensors]
        if dim in key:
            labels.append(_join(pieces, tensors, dim))
            if len(key) > 1:
                _same_rows(walk, call, pieces, tuple(d for d in key if d != dim))
            continue
        full = [p for p in pieces if p.numel() > 1]
        for p in pieces:
            if p.numel() == 1:
                walk.pin(call, full[0], "is joined with channels that no parameter makes")
            else:
                walk.system.same(full[0], p, call.site)
        labels.append(full[0])
    facts = _joined_facts(walk, tensors, dim) if walk.with_facts else None
    walk.give(out, tuple(labels), facts)


def stack(walk: Stream, call: Call) -> None:
    """Values beside each other on a new dim: what is at one place in each of them is one."""
    tensors, out = call.tensors, call.outputs[0]
    dim = (call.arg("dim") or 0) % out.dim()
    labels: dict[tuple[int, ...], Tensor] = {}
    for key in sorted({varying(label) for t in tensors for label in walk.value(t).labels}):
        pieces = [_piece(walk, t, key) for t in tensors]
        full = next(p for p in pieces if p.numel() > 1)
        labels[key] = full.unsqueeze(dim)
        for p in pieces:
            if p.numel() == 1:
                walk.pin(call, full, "is joined with channels that no parameter makes")
            else:
                walk.system.same(full, p, call.site)
    found = [walk.value(t).facts for t in tensors]
    agree = all(f is not None and found[0] is not None and f.same_as(found[0]) for f in found)
    facts = _stacked_facts(found, out.dim() - 1, dim) if walk.with_facts else None
    walk.splits |= any(f is not None for f in found) and not agree
    walk.give(out, tuple(labels.values()), facts)


def _same_rows(walk: Stream, call: Call, pieces: list[Tensor], dims: tuple[int, ...]) -> None:
    """Blocks that are joined side by side: they go together."""
    if any(varying(p) != varying(pieces[0]) for p in pieces):
        for p in pieces:
            walk.pin(call, p, "is joined with channels that no parameter makes")
        return
    rows = [rows_of(p, dims) for p in pieces]
    gate = walk.rows(torch.stack([r[:, 0] for r in rows], 1))
    for row in rows:
        walk.link(row, gate, call.site)


def _piece(walk: Stream, tensor: Tensor, key: tuple[int, ...]) -> Tensor:
    for label in walk.value(tensor).labels:
        if varying(label) == key:
            return label
    return torch.zeros((1,) * tensor.dim(), dtype=torch.int64)


def _join(pieces: list[Tensor], tensors: list[Tensor], dim: int) -> Tensor:
    rank = tensors[0].dim()
    shape = [max(p.size(d) for p in pieces) for d in range(rank)]
    full = [
        p.expand(*shape[:dim], t.size(dim), *shape[dim + 1 :])
        for p, t in zip(pieces, tensors, strict=True)
    ]
    return torch.cat(full, dim)


def _stacked_facts(found: list[Facts | None], rank: int, dim: int) -> Facts | None:
    known = [f for f in found if f is not None]
    if not known:
        return None
    filled = same_place([_unknown(rank) if f is None else f.aligned(rank) for f in found])
    values = torch.stack([torch.stack([f.values[m] for f in filled], dim) for m in (0, 1)])
    return _compressed(
        Facts(
            torch.stack([f.known for f in filled], dim), values,
            torch.stack([f.profile for f in filled], dim),
        )
    )  # fmt: skip


def _unknown(rank: int) -> Facts:
    """Facts of a tensor of which nothing is known."""
    blank = torch.zeros((1,) * rank)
    return Facts(blank.bool(), torch.zeros((2,) + (1,) * rank).double(), blank.long())


def _joined_facts(walk: Stream, tensors: list[Tensor], dim: int) -> Facts | None:
    found = [walk.value(t).facts for t in tensors]
    if all(f is None for f in found):
        return None
    rank = tensors[0].dim()
    filled = [_unknown(rank) if f is None else f.aligned(rank) for f in found]

    def join(read: Callable[[Facts], Tensor]) -> Tensor:
        return _join([read(f) for f in filled], tensors, dim)

    values = torch.stack([join(lambda f, m=m: f.values[m]) for m in (0, 1)])  # type: ignore[misc]
    return Facts(join(lambda f: f.known), values, join(lambda f: f.profile))


def pad(walk: Stream, call: Call) -> None:
    """Padding of dims without channels leaves labels alone; other channels would be new ones."""
    x, out = call.args[0], call.outputs[0]
    amounts: list[int] = call.args[1]
    rank = x.dim()
    padded = {rank - 1 - k // 2 for k, n in enumerate(amounts) if n}
    labels = []
    for label in walk.value(x).labels:
        if padded & set(varying(label)):
            walk.pin(call, label, "padding adds channels")
        else:
            labels.append(label)
    facts = walk.value(x).facts
    fill: Any = call.arg("value") or 0.0
    kept = Facts.of(facts.zero, facts.values) if facts is not None and fill == 0.0 else None
    if kept is not None and any(kept.known.size(d) > 1 for d in padded):
        kept = None
    walk.give(out, tuple(labels), kept)


def index(walk: Stream, call: Call) -> None:
    """`x[..., numbers]`: known numbers pick channels as they pick anything; others keep them."""
    x = call.args[0]
    given = call.args[1] if isinstance(call.args[1], (list, tuple)) else None
    picks = [call.args[2]] if given is None else [i for i in given if i is not None]
    dims = [call.args[1] % x.dim()] if given is None else _indexed(given)
    numbers = [_content(walk, i) for i in picks]
    for i in picks:
        for label in walk.value(i).labels:
            walk.pin(call, label, STRUCTURE)
    labels = walk.value(x).labels
    unknown = any(n is None for n in numbers)
    if unknown or walk.value(x).data is not None:  # what is looked up in a table is no channel
        for label in labels:
            if set(varying(label)) & set(dims):
                walk.pin(call, label, "its rows are looked up")
        labels = tuple(t for t in labels if not set(varying(t)) & set(dims))
    if unknown:
        numbers = [torch.zeros(i.shape, dtype=torch.int64) for i in picks]
    feed = iter(numbers)
    args: tuple[Any, ...] = (x, call.args[1], numbers[0])
    if given is not None and len(picks) == 1 and numbers[0] is not None and picks[0].dim() == 1:
        args = (x, dims[0], numbers[0])
    elif given is not None:
        args = (x, [None if i is None else next(feed) for i in given])
    before = walk.value(x)
    walk.relabel(x, labels)
    move(walk, Call(call.op, args, {}, call.out, call.site))
    x.__dict__["demp"] = before


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


def _indexed(given: Sequence[Tensor | None]) -> list[int]:
    """Which dims a list of indices is about; a mask takes as many as it has."""
    dims, at = [], 0
    for i in given:
        width = i.dim() if i is not None and i.dtype == torch.bool else 1
        dims += list(range(at, at + width)) if i is not None else []
        at += width
    return dims


def _content(walk: Stream, numbers: Tensor) -> Tensor | None:
    """The numbers in an index, where they do not depend on the input."""
    real = walk.value(numbers).data
    if real is None and not numbers.is_meta:
        real = numbers
    return None if real is None or real.is_meta or real.dtype == torch.bool else real.cpu()


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


RULES: dict[str, Rule] = {
    "aten::cat": cat,
    "aten::stack": stack,
    "aten::index": index,
    "aten::index_select": index,
    "aten::constant_pad_nd": pad,
    **dict.fromkeys(REARRANGE, move),
    "aten::pixel_shuffle": pixel_shuffle,
    "aten::as_strided_": _restride,
    "aten::as_strided": lambda walk, call: _refuse(walk, call),
}


def _refuse(walk: Stream, call: Call) -> None:
    for label in walk.value(call.tensors[0]).labels:
        walk.pin(call, label, f"{call.op._schema.name} looks through the memory")
    walk.give(call.outputs[0], ())


def _cat_shape(args: tuple[Any, ...]) -> Tensor:
    """The sizes of a join, without the long way through its decomposition."""
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    first = tensors[0]
    rest = [t.shape[:dim] + t.shape[dim:][1:] for t in tensors] if dim >= 0 else []
    if any(r != rest[0] or t.dtype != first.dtype for r, t in zip(rest, tensors, strict=False)):
        rest = []
    if not rest or not all(t.is_meta and t.is_contiguous() for t in tensors):
        result: Tensor = torch.ops.aten.cat.default(*args)
        return result
    shape = list(first.shape)
    shape[dim] = sum(t.size(dim) for t in tensors)
    return torch.empty(shape, dtype=first.dtype, device="meta")


SHAPES: dict[torch._ops.OpOverload, Shape] = {torch.ops.aten.cat.default: _cat_shape}
