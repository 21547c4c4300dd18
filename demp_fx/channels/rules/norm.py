"""Batch norm: elementwise on its channel axis, whatever it computes over batch and space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, moved, varying
from demp_fx.channels.rules.pointwise import twin
from demp_fx.channels.stream import Rule, Shape, Stream
from demp_fx.channels.value import Call

aten = torch.ops.aten


def batch_norm(walk: Stream, call: Call) -> None:
    """Tie scale, shift and running statistics to dim 1 of the input."""
    x, out = call.args[0], call.outputs[0]
    rank = x.dim()
    merged: dict[tuple[int, ...], Tensor] = {
        varying(label): label for label in walk.value(x).labels
    }
    for t in _parameters(call):
        if t is None:
            continue
        for label in walk.value(t).labels:
            if (1,) in merged:
                walk.system.same(merged[(1,)], label, call.site)
            elif x.size(1) > 1:
                walk.pin(call, label, "normalises channels that no parameter makes")
    labels: Labels = tuple(merged.values())
    facts = _constants(walk, call) if walk.with_facts else None
    walk.give(out, labels, None if facts is None else facts.spread(rank, 1))


def _parameters(call: Call) -> list[Tensor | None]:
    """Weight, bias, running mean, running variance."""
    return [call.arg(name) for name in ("weight", "bias", "running_mean", "running_var")]


def _constants(walk: Stream, call: Call) -> Facts | None:
    """A scale of zero leaves the shift; a constant becomes its image under the running statistics
    in eval mode, and the shift alone in train mode (its deviation from the batch mean is zero)."""
    x = call.args[0]
    size = x.size(1)
    weight, bias, mean, var = _parameters(call)
    scale = None if weight is None else _numbers(walk, weight)
    before = walk.value(x).facts
    seen = before.along(1, size) if before is not None else None
    dead = torch.zeros(size, dtype=torch.bool) if scale is None else scale == 0
    known = dead if seen is None else dead | seen.flat
    if not bool(known.any()):
        return None
    shift = torch.zeros(size, dtype=torch.float64) if bias is None else _numbers(walk, bias)
    if shift is None or (weight is not None and scale is None):
        return None
    in_eval = shift
    if mean is not None and var is not None and seen is not None:
        centre, spread = _numbers(walk, mean), _numbers(walk, var)
        if centre is None or spread is None:
            return None
        eps = call.arg("eps") or call.arg("epsilon") or 0.0
        normal = (seen.values[0] - centre) * (spread + eps).rsqrt()
        in_eval = normal + shift if scale is None else normal * scale + shift
        in_eval = torch.where(dead, shift, in_eval)
    return Facts.of(known, torch.stack([in_eval, shift]))


def _numbers(walk: Stream, tensor: Tensor) -> Tensor | None:
    """The numbers of a vector, where they are known."""
    value = walk.value(tensor)
    if value.data is not None:
        return None if value.data.is_meta else value.data.to("cpu", torch.float64)
    facts = value.facts
    return None if facts is None or not bool(facts.known.all()) else facts.values[0].reshape(-1)


def spread(walk: Stream, call: Call) -> None:
    """A norm over dims that hold no channels: labels pass where they do not vary there."""
    x, out = call.args[0], call.outputs[0]
    dims = range(x.dim() - len(call.args[1]), x.dim())
    labels = []
    for label in walk.value(x).labels:
        if set(varying(label)) & set(dims):
            walk.pin(call, label, "layer norm mixes all channels")
        else:
            kept = moved(label, {d: d for d in range(x.dim())}, out.dim())
            labels += [kept] if kept is not None else []
    for t in call.tensors[1:]:
        for label in walk.value(t).labels:
            walk.pin(call, label, "layer norm mixes all channels")
    walk.give(out, tuple(labels))


RULES: dict[str, Rule] = {
    "aten::native_batch_norm": batch_norm,
    "aten::_native_batch_norm_legit": batch_norm,
    "aten::_native_batch_norm_legit_no_training": batch_norm,
    "aten::_batch_norm_with_update": batch_norm,
    "aten::cudnn_batch_norm": batch_norm,
    "aten::native_layer_norm": spread,
}


def _normalised(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return twin(args[0]), _NONE, _NONE


_NONE = torch.empty(0, device="meta")
SHAPES: dict[torch._ops.OpOverload, Shape] = {
    aten.native_batch_norm.default: _normalised,
    aten.native_layer_norm.default: _normalised,
}
