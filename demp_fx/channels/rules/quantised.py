"""Numbers that are rounded to those of a quantised network: elementwise, and zero stays zero."""

from __future__ import annotations

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import along
from demp_fx.channels.rules.pointwise import aligned
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call


def rounded(walk: Stream, call: Call) -> None:
    """`fake_quantize(x, scale, zero_point, ...)`: one scale for all, or one for each channel."""
    x, *others = call.tensors
    axis, out = call.arg("axis"), call.outputs[0]
    spread = [x, *(t if axis is None else _on_axis(walk, t, x.dim(), axis) for t in others)]
    labels = aligned(walk, Call(call.op, tuple(spread), {}, call.out, call.site), out)
    facts = walk.value(x).facts if walk.with_facts else None
    zeros = None if facts is None else Facts.of(facts.zero, facts.values)
    for result in call.outputs:
        walk.give(result, labels if result.shape == out.shape else (), zeros)


def _on_axis(walk: Stream, line: Tensor, rank: int, axis: int) -> Tensor:
    shape = [1] * rank
    shape[axis] = line.numel()
    out = torch.empty(shape, dtype=line.dtype, device="meta")
    labels = (along(label.reshape(-1), rank, axis) for label in walk.value(line).labels)
    walk.give(out, tuple(labels), moved=True)
    return out


RULES: dict[str, Rule] = dict.fromkeys(
    ("aten::fake_quantize_per_channel_affine_cachemask",
     "aten::fake_quantize_per_tensor_affine_cachemask",
     "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams"), rounded
)  # fmt: skip
