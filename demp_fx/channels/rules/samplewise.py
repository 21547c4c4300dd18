"""Convolution of each sample with weights of its own, as it is written for torch: the batch is
merged with the channels, and each sample is a group, or several."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, varying
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call


def samples_in(walk: Stream, call: Call) -> int:
    """How many samples there are in the groups of a convolution: so often its filters repeat
    themselves, or (where they have no channels) its input does; 1 where there are none."""
    x, weight = call.args[:2]
    filters = [label for label in walk.value(weight).labels if 0 in varying(label)]
    channels = [label.transpose(0, 1) for label in walk.value(x).labels if 1 in varying(label)]
    return math.gcd(call.args[8], *map(_copies, filters or channels)) if filters or channels else 1


def _copies(label: Tensor) -> int:
    """How often the slices along the first dim repeat themselves, all in the same order."""
    rows = label.flatten(1).numpy()
    again = (rows[1:] == rows[0]).all(1).nonzero()[0] + 1
    for period in again[len(rows) % again == 0].tolist():
        parts = rows.reshape(-1, period, rows.shape[1])
        if np.array_equal(parts, np.broadcast_to(parts[:1], parts.shape)):
            return len(parts)
    return 1


def samplewise(walk: Stream, call: Call, samples: int, rule: Rule) -> None:
    """Follow one sample by the `rule` of a convolution; what it says holds for each of them."""
    x, weight, bias = call.args[:3]
    out = call.outputs[0]
    batch = _apart(walk, call, x, samples)
    one = [_first(walk, call, t, samples) for t in (weight, bias)]
    result = torch.empty(_sizes(out, samples), dtype=out.dtype, device="meta")
    groups = call.args[8] // samples
    rule(walk, Call(call.op, (batch, *one, *call.args[3:8], groups), {}, result, call.site))
    found = walk.value(result)
    labels = tuple(_repeated(label, samples) for label in found.labels)
    facts = found.facts
    if facts is not None:
        facts = facts.map(lambda t: _repeated(t, samples))
    walk.give(out, labels, facts, moved=True)


def _sizes(tensor: Tensor, samples: int) -> list[int]:
    """With the samples in the batch instead of among the channels."""
    batch, channels, *space = tensor.shape
    return [batch * samples, channels // samples, *space]


def _apart(walk: Stream, call: Call, x: Tensor, samples: int) -> Tensor:
    """A value whose samples are in its batch again."""
    batch = torch.empty(_sizes(x, samples), dtype=x.dtype, device="meta")
    labels = _of_one(walk, call, walk.value(x).labels, 1, samples)
    walk.give(batch, labels, _known(walk, x, 1, samples), moved=True)
    return batch


def _first(walk: Stream, call: Call, weight: Tensor | None, samples: int) -> Tensor | None:
    """The weight, or the bias, of one sample."""
    if weight is None:
        return None
    one = weight.narrow(0, 0, weight.size(0) // samples)
    labels = _of_one(walk, call, walk.value(weight).labels, 0, samples)
    walk.give(one, labels, _known(walk, weight, 0, samples), moved=True)
    return one


def _of_one(walk: Stream, call: Call, labels: Labels, dim: int, samples: int) -> Labels:
    """Labels of one sample, to which those of all others are tied."""
    found = []
    for label in labels:
        if dim in varying(label):
            parts = label.unflatten(dim, (samples, -1))
            first = parts.narrow(dim, 0, 1)
            if not torch.equal(first.expand(parts.shape), parts):
                walk.system.same(first.expand(parts.shape), parts, call.site)
            label = first.flatten(dim, dim + 1).clone()  # it is not the one that repeats itself
        found.append(label)
    return tuple(found)


def _known(walk: Stream, tensor: Tensor, dim: int, samples: int) -> Facts | None:
    """What is known of every sample."""
    facts = walk.value(tensor).facts
    if not walk.with_facts or facts is None:
        return None
    facts = facts.aligned(tensor.dim())
    if facts.known.size(dim) == 1:
        return facts
    parts = facts.map(lambda t: t.unflatten(dim, (samples, -1)))
    first = parts.map(lambda t: t.narrow(dim, 0, 1))
    alike = first.map(lambda t: t.expand(parts.known.shape)).same_as(parts)
    return first.map(lambda t: t.flatten(dim, dim + 1)) if alike else None


def _repeated(t: Tensor, samples: int) -> Tensor:
    """One sample's channels, for all of them in a row."""
    return t.repeat(1, samples, *[1] * (t.dim() - 2)) if t.size(1) > 1 else t
