"""Windows over space laid out as channels, each channel's taps side by side, and put back."""

from __future__ import annotations

from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, along, varying
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call


def unfold(walk: Stream, call: Call) -> None:
    """`im2col`: channel c becomes the entries c * taps ... c * taps + taps - 1."""
    x, out, taps = call.args[0], call.outputs[0], _taps(call)
    dim = x.dim() - 3
    labels = [
        along(label.reshape(-1).repeat_interleave(taps), out.dim(), dim)
        if varying(label) == (dim,)
        else label.reshape(label.shape[:-1])
        for label in _outside(walk, call, x, (dim + 1, dim + 2))
    ]
    facts = walk.value(x).facts if walk.with_facts else None
    seen = None if facts is None else facts.along(dim, x.size(dim))
    if seen is not None:
        padded = any(n != 0 for n in call.args[3])
        known = seen.zero if padded else seen.flat
        seen = Facts.of(known, seen.values)
    if seen is not None:
        seen = seen.map(lambda t: t.repeat_interleave(taps)).spread(out.dim(), dim)
    walk.give(out, tuple(labels), seen)


def fold(walk: Stream, call: Call) -> None:
    """`col2im`: the taps of a channel are summed up where windows overlap; they go together."""
    x, out, taps = call.args[0], call.outputs[0], _taps(call)
    dim, labels = x.dim() - 2, []
    walk.opens = walk.splits = True
    for label in _outside(walk, call, x, (dim + 1,)):
        if varying(label) == (dim,):
            lines = walk.tie(label.reshape(-1, taps), (1,), call)
            label = lines.reshape(-1)
            if label.numel() == 1:
                walk.pin(call, label, "a single channel is made")
                continue
            labels.append(along(label, out.dim(), dim))
        else:
            labels.append(label.unsqueeze(-1))
    facts = walk.value(x).facts if walk.with_facts else None
    seen = None if facts is None else facts.along(dim, x.size(dim))
    known = None
    if seen is not None:
        zero = seen.zero.reshape(-1, taps).all(1)
        known = Facts.zeros(zero).spread(out.dim(), dim) if bool(zero.any()) else None
    walk.give(out, tuple(labels), known)


def _taps(call: Call) -> int:
    height, width = call.arg("kernel_size")
    return int(height * width)


def _outside(walk: Stream, call: Call, x: Tensor, space: tuple[int, ...]) -> Labels:
    """The labels of a value that windows leave where they are: the others are pinned."""
    kept = []
    for label in walk.value(x).labels:
        if len(varying(label)) == 1 and not set(varying(label)) & set(space):
            kept.append(label)
        else:
            walk.pin(call, label, f"{call.op._schema.name} mixes its axis with another one")
    return tuple(kept)


RULES: dict[str, Rule] = {"aten::im2col": unfold, "aten::col2im": fold}
