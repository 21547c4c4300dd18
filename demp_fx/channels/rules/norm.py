"""Normalisation: over batch and space elementwise on the channels, else over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from demp_fx.channels.constraints import Read
from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, along, varying
from demp_fx.channels.rules.couple import couple
from demp_fx.channels.rules.known import zero_at
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call

aten = torch.ops.aten


def batch_norm(walk: Stream, call: Call) -> None:
    """Tie scale, shift and running statistics to dim 1 of the input."""
    x, out = call.args[0], call.outputs[0]
    rank = x.dim()
    merged: dict[tuple[int, ...], Tensor] = {}
    mixed: list[Tensor] = []
    for label in walk.value(x).labels:
        others = tuple(d for d in varying(label) if d != 1)
        if 1 not in varying(label):
            walk.opens = True
            walk.pin(call, label, "its statistics are over channels", (label,))
            mixed.append(label)
            continue
        line = walk.tie(label, others, call)
        if varying(line) in merged:
            walk.system.same(merged[varying(line)], line, call.site)
        else:
            merged[varying(line)] = line
    for t in _parameters(call):
        if t is None:
            continue
        for label in walk.value(t).labels:
            if (1,) in merged:
                line = merged[(1,)]
                walk.system.same(line, label, call.site)
                if not bool(line.all()):  # joined with an image, say: here all have a name
                    merged[(1,)] = along(label.reshape(-1), rank, 1)
            elif x.size(1) > 1:
                walk.pin(call, label, "normalises channels that no parameter makes")
    labels: Labels = (*merged.values(), *mixed)
    if not labels:
        walk.opens = True
        labels = _of_the_scale(walk, _parameters(call), rank, 1)
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
    dead = torch.zeros(size, dtype=torch.bool) if weight is None else _zeros(walk, weight)
    known = dead if seen is None else dead | seen.flat
    if not bool(known.any()):
        return None
    shift = torch.zeros(size, dtype=torch.float64) if bias is None else _numbers(walk, bias)
    if shift is None:
        return None
    in_eval = shift
    if mean is not None and var is not None and seen is not None:
        centre, spread = _numbers(walk, mean), _numbers(walk, var)
        if centre is None or spread is None or (weight is not None and scale is None):
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
    return (
        None
        if facts is None or not bool(facts.known.all())
        else facts.values[0].expand(tensor.shape)
    )


def _zeros(walk: Stream, vector: Tensor) -> Tensor:
    """Where a vector, or one that is computed of parameters, is known to be zero."""
    facts = walk.value(vector).facts
    blank = torch.zeros(vector.shape, dtype=torch.bool)
    return blank if facts is None else blank | facts.zero


def layer_norm(walk: Stream, call: Call) -> None:
    """Scale and shift go with the channels; each result needs all of them."""
    x, out = call.args[0], call.outputs[0]
    dims = tuple(range(x.dim() - len(call.args[1]), x.dim()))
    _over_channels(walk, call, dims, call.args[2:4], "layer norm over channels")
    facts = _shift(walk, call.args[2:4], out, dims)
    if facts is None and call.args[3] is None:
        facts = _blank(walk, x, dims)
    walk.give(out, walk.value(out).labels, facts)


def _blank(walk: Stream, x: Tensor, dims: tuple[int, ...]) -> Facts | None:
    """What is zero all along the dims of a norm stays so, if no shift follows."""
    seen = walk.value(x).facts if walk.with_facts else None
    zero = None if seen is None else seen.aligned(x.dim()).zero
    if zero is None or any(zero.size(d) > 1 for d in dims):
        return None
    return Facts.of(zero, torch.zeros(2, *zero.shape, dtype=torch.float64))


def weight_norm(walk: Stream, call: Call) -> None:
    """A weight of length one along each index of a dim, times a scale of that index."""
    g, dim = call.args[1], call.arg("dim")
    _by_index(walk, call)
    weight, norms = call.outputs
    for scale in walk.value(g).labels:
        for label in walk.value(weight).labels:
            if varying(label) == varying(scale) == (dim,):
                walk.system.same(label, scale, call.site)
    facts = walk.value(g).facts if walk.with_facts else None
    zero = None if facts is None else Facts.of(facts.zero, torch.zeros_like(facts.values))
    walk.give(weight, walk.value(weight).labels, zero)
    walk.give(norms, ())


def _others(call: Call, rank: int) -> list[int]:
    """All dims but the one that the argument `dim` names."""
    return [d for d in range(rank) if d != call.arg("dim") % rank]


_by_index = couple(_others, "weight norm", None)


def group_norm(walk: Stream, call: Call) -> None:
    """Groups of channels: a group needs all of its own, and stays or goes as a whole."""
    x, out, parameters = call.args[0], call.outputs[0], call.args[1:3]
    size, groups = x.size(1), call.args[6]
    labels = walk.value(x).labels
    mine = [label for label in labels if varying(label) == (1,)]
    if len(mine) != len(labels) or not mine or size == groups == 1:
        _over_channels(walk, call, tuple(range(1, x.dim())), parameters, "group norm over channels")
    else:
        walk.opens = walk.splits = True
        _follow(walk, call, parameters, mine[0].reshape(-1))
        blocks = mine[0].reshape(groups, -1)
        gate = walk.rows(blocks[:, :1])
        walk.link(blocks, gate, call.site)
        inputs, gates = blocks.reshape(-1), gate.repeat_interleave(size // groups)
        walk.system.flow.append(Read(inputs, (inputs,), None, None, None, 0, 0, call.site, gates))
        walk.give(out, labels)
    walk.give(out, walk.value(out).labels, _shift(walk, parameters, out, (1,)))


def _over_channels(
    walk: Stream, call: Call, dims: tuple[int, ...], parameters: Sequence[Tensor | None],
    reason: str,
) -> None:  # fmt: skip
    """A norm over `dims`, with scale and shift on the last of them."""
    x, out = call.args[0], call.outputs[0]
    labels: list[Tensor] = []
    walk.opens = walk.splits = True
    for label in walk.value(x).labels:
        if set(varying(label)) & set(dims):
            label = walk.tie(label, tuple(d for d in varying(label) if d not in dims), call)
        labels.append(label)
    walk.relabel(x, tuple(labels))
    mixed = [label for label in labels if set(varying(label)) & set(dims)]
    facts = walk.value(x).facts if walk.with_facts and walk.running.counted else None
    for label in mixed:
        zero = None if facts is None else zero_at(facts, label)
        walk.pin(call, label, reason, tuple(labels), zero)
    single = len(mixed) == 1 and len(varying(mixed[0])) == 1
    atoms = mixed[0].reshape(-1) if single else None
    _follow(walk, call, parameters, atoms, reason)
    if atoms is not None:  # of the scale, each channel has an atom of its own
        own = [x for t in parameters if t is not None for x in walk.value(t).labels]
        if own and own[0].numel() == atoms.numel():
            named = own[0].reshape(mixed[0].shape)
            labels = [named if x is mixed[0] else x for x in labels]
    if not mixed:
        labels += _of_the_scale(walk, parameters, x.dim(), dims[0])
    walk.give(out, tuple(labels))


def _of_the_scale(
    walk: Stream, parameters: Sequence[Tensor | None], rank: int, first: int
) -> Labels:
    """The labels of scale and shift, from the `first` of their dims on: channels that no parameter
    makes have their names. They stay, but whoever reads them may do without some."""
    found = (walk.value(t).labels for t in parameters if t is not None)
    return tuple(
        label.reshape((1,) * first + label.shape + (1,) * (rank - first - label.dim()))
        for label in next(filter(None, found), ())
    )


def _follow(
    walk: Stream, call: Call, parameters: Sequence[Tensor | None], atoms: Tensor | None,
    reason: str = "normalises channels that no parameter makes",
) -> None:  # fmt: skip
    """Tie scale and shift to the channels that they are applied to."""
    for t in parameters:
        for label in walk.value(t).labels if t is not None else ():
            if atoms is not None and label.numel() == atoms.numel():
                walk.system.same(atoms, label.reshape(-1), call.site)
            else:
                walk.pin(call, label, reason)


def _shift(
    walk: Stream, parameters: Sequence[Tensor | None], out: Tensor, dims: tuple[int, ...]
) -> Facts | None:
    """Where the scale is zero, the result is the shift."""
    weight, bias = parameters
    if not walk.with_facts or weight is None or weight.dim() != 1:
        return None
    scale = _numbers(walk, weight)
    shift = None if bias is None else _numbers(walk, bias)
    if scale is None or (bias is not None and shift is None):
        return None
    values = torch.zeros_like(scale) if shift is None else shift
    facts = Facts.of(scale == 0, values.expand(2, -1))
    return None if facts is None else facts.spread(out.dim(), dims[-1])


RULES: dict[str, Rule] = {
    "aten::native_batch_norm": batch_norm,
    "aten::_native_batch_norm_legit": batch_norm,
    "aten::_native_batch_norm_legit_no_training": batch_norm,
    "aten::_batch_norm_with_update": batch_norm,
    "aten::cudnn_batch_norm": batch_norm,
    "aten::native_layer_norm": layer_norm,
    "aten::native_group_norm": group_norm,
    "aten::_weight_norm_interface": weight_norm,
    "aten::renorm": couple(_others, "limit of norms", "zero"),
}
