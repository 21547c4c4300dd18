"""Complex numbers: pairs of real ones, whose last dim of two carries no channels of its own."""

from __future__ import annotations

from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.rules.couple import couple, named
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call


def joined(walk: Stream, call: Call) -> None:
    """Two parts become one number: where they were channels, they go together or stay."""
    x, out = call.args[0], call.outputs[0]
    last, labels = x.dim() - 1, []
    value = walk.value(x)
    for label in value.labels:
        line = walk.tie(label, (last,), call).squeeze(last)
        if line.numel() > 1:
            labels.append(line)
        else:
            walk.pin(call, line, "is a part of a complex number")
    known = _zeros(walk, x)
    zero = None if known is None else known.all(last)
    _give(walk, call, out, tuple(labels), zero)


def parted(walk: Stream, call: Call) -> None:
    """A number becomes its two parts; a channel has both of them."""
    labels = tuple(label.unsqueeze(-1) for label in walk.value(call.args[0]).labels)
    zero = _zeros(walk, call.args[0])
    _give(walk, call, call.outputs[0], labels, None if zero is None else zero.unsqueeze(-1))


def turned(walk: Stream, call: Call) -> None:
    """Some parts change their sign: zeros stay."""
    x = call.args[0]
    _give(walk, call, call.outputs[0], walk.value(x).labels, _zeros(walk, x))


def _zeros(walk: Stream, x: Tensor) -> Tensor | None:
    facts = walk.value(x).facts if walk.with_facts else None
    return None if facts is None else facts.aligned(x.dim()).zero


def _give(
    walk: Stream, call: Call, out: Tensor, labels: tuple[Tensor, ...], zero: Tensor | None
) -> None:
    data = walk.value(call.args[0]).data
    facts = None
    if zero is not None and bool(zero.any()):
        facts = Facts.zeros(zero)
    walk.give(out, labels, facts, None if data is None else call.op(data), moved=True)


RULES: dict[str, Rule] = {
    "aten::view_as_complex": joined,
    "aten::view_as_real": parted,
    **dict.fromkeys(("aten::_conj", "aten::_neg_view"), turned),
    **dict.fromkeys(
        ("aten::_fft_r2c", "aten::_fft_c2r", "aten::_fft_c2c"), couple(named, "fft", "zero")
    ),
}
