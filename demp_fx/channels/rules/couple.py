"""Ops that mix or resize along some dims: channels elsewhere pass, channels there are pinned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.blocks import outer_to_inner, rows_of
from demp_fx.channels.constraints import Read
from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import moved, varying
from demp_fx.channels.rules.known import zero_at
from demp_fx.channels.rules.pointwise import aligned
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call

Dims = Callable[[Call, int], list[int]]

# What zeros do not change, wherever they stand: they need not be there.
INERT = {"aten::sum", "aten::cumsum", "aten::norm", "aten::linalg_vector_norm",
         "aten::_cdist_forward", "aten::_euclidean_dist", "aten::cdist"}  # fmt: skip
# What they do not change where nothing is negative.
INERT_BELOW = {"aten::amax", "aten::max"}


def trailing(count: int) -> Dims:
    """The last `count` dims: space."""
    return lambda call, rank: list(range(rank - count, rank))


def resized(count: int) -> Dims:
    """Those of the last `count` dims that get another size than they had: an adaptive pool leaves
    the others as they are."""

    def dims(call: Call, rank: int) -> list[int]:
        before, after = (tuple(t.shape) for t in (call.tensors[0], call.outputs[0]))
        return [d for d in range(rank - count, rank) if before[d] != after[d]]

    return dims


def named(call: Call, rank: int) -> list[int]:
    """The dims that the argument `dim` names; all of them where it is None or empty."""
    given: Any = call.arg("dim")
    if given is None or given == []:
        return list(range(rank))
    return [d % rank for d in ([given] if isinstance(given, int) else given)]


def couple(dims_of: Dims, verb: str, keeps: str | None) -> Rule:
    """A rule for an op over some dims: it needs all channels there, but for zeros in a sum.

    `keeps`: how constants that do not vary there fare. "all": unchanged (a mean, a maximum);
    "average": unchanged but where zero padding is counted in; "zero": only zeros are (a sum); None:
    nothing is known any more.
    """

    def rule(walk: Stream, call: Call) -> None:
        x = call.tensors[0]
        rank = x.dim()
        dims = dims_of(call, rank)
        value = walk.value(x)
        facts = value.facts if walk.with_facts else None
        for out in call.outputs:
            rest = [d for d in range(rank) if d not in dims]
            place = {d: d for d in rest}
            if out.dim() != rank:
                place = {d: k for k, d in enumerate(rest)}
            elif out.shape == x.shape:
                place = {d: d for d in range(rank)}
            labels: list[Tensor] = []
            for label in value.labels:
                mixed, free = _apart(label, dims)
                if mixed and free and set(outer_to_inner(label)[: len(free)]) != set(free):
                    # blocks side by side: what is at one place in each of them is one
                    kept = moved(walk.tie(label, mixed, call), place, out.dim())
                elif mixed and free:
                    line = _by_rows(walk, call, label, free, facts)
                    kept = moved(label if out.shape == x.shape else line, place, out.dim())
                else:
                    kept = moved(label, place, out.dim())
                labels += [] if kept is None else [kept]
            for label in value.labels:
                mixed, free = _apart(label, dims)
                if mixed and not free:
                    _needed(walk, call, label, tuple(labels), f"{verb} over channels", facts)
            inert = {d: k for d, k in place.items() if d not in dims}
            walk.give(out, tuple(labels), _constants(walk, call, facts, keeps, inert, out))

    return rule


def _inert(walk: Stream, call: Call) -> bool:
    """Whether nobody misses a zero here; in an average, if it is told how many there were."""
    name, orders = call.op._schema.name, (call.arg("ord"), call.arg("p"))
    if any(isinstance(order, (int, float)) and order < 0 for order in orders):
        return False  # a norm of numbers to a negative power
    if name in INERT_BELOW and walk.value(call.tensors[0]).never_negative:
        return len(call.outputs) == 1 or walk.running.values_alone
    if walk.zeros_matter is not None:
        return not walk.zeros_matter and name in {*INERT, "aten::mean"}
    return name in INERT or (name == "aten::mean" and walk.running.counted)


def _apart(label: Tensor, dims: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dims of a label that are among `dims`, and the others."""
    all_ = varying(label)
    return tuple(d for d in all_ if d in dims), tuple(d for d in all_ if d not in dims)


def _by_rows(
    walk: Stream, call: Call, label: Tensor, rest: tuple[int, ...], facts: Facts | None
) -> Tensor:
    """Blocks of which each is mixed in itself: a block needs its own, where it is needed.

    Returns the label that says which blocks are there.
    """
    walk.opens = walk.splits = True
    rows = rows_of(label, rest)
    gate = walk.rows(rows[:, :1])
    walk.link(rows, gate, call.site)
    first = walk.firsts(gate)
    silent = None
    if _inert(walk, call) and facts is not None:
        silent = rows_of(zero_at(facts, label), rest)[first].reshape(-1)
    inputs, gates = rows[first], gate[first].repeat_interleave(rows.size(1))
    walk.system.flow.append(
        Read(inputs.reshape(-1), (gate,), None, silent, None, 0, 0, call.site, gates)
    )
    shape = [label.size(d) if d in rest else 1 for d in range(label.dim())]
    return gate.reshape(shape)


def _needed(
    walk: Stream, call: Call, label: Tensor, labels: tuple[Tensor, ...], reason: str,
    facts: Facts | None,
) -> None:  # fmt: skip
    """All channels on a dim are needed for any of the result; nobody misses zeros in a sum."""
    walk.opens = walk.splits = True
    zero = zero_at(facts, label) if facts is not None and _inert(walk, call) else None
    walk.pin(call, label, reason, tuple(x for x in labels if x.numel()), zero)


def _constants(
    walk: Stream, call: Call, facts: Facts | None, keeps: str | None, place: dict[int, int],
    out: Tensor,
) -> Facts | None:  # fmt: skip
    if facts is None or keeps is None or not (out.is_floating_point() or out.is_complex()):
        return None
    mixed = [d for d in range(facts.known.dim()) if d not in place and facts.known.size(d) > 1]
    if mixed:  # zeros all along the dims that go give zeros, whatever the op
        zero = facts.zero.all(mixed[0], keepdim=True)
        for d in mixed[1:]:
            zero = zero.all(d, keepdim=True)
        only = Facts.of(zero, torch.zeros((2, *zero.shape), dtype=torch.float64))
        if only is None:
            return None
        facts = only

    def shift(t: Tensor) -> Tensor:
        shape = [1] * out.dim()
        for d, k in place.items():
            shape[k] = t.size(d)
        return t.reshape(shape)

    moved_facts = facts.map(shift)
    if keeps == "zero" or call.arg("divisor_override") is not None:
        return Facts.of(moved_facts.zero, moved_facts.values)
    profile = walk.profile() if keeps == "average" and _uneven(walk, call) else 0
    return Facts.of(moved_facts.flat, moved_facts.values, profile)


def _uneven(walk: Stream, call: Call) -> bool:
    """Average pooling that counts zeros beyond the border, of this input or another one."""
    padding = call.arg("padding") or [0]
    padding = [padding] if isinstance(padding, int) else padding
    padded = any(p != 0 for p in padding) or walk.running.sized
    return padded and bool(call.arg("count_include_pad"))


def embedding(walk: Stream, call: Call) -> None:
    """Rows are picked by data: they stay. Columns are the channels of the result. Bags of rows sum
    them up, or pick from them."""
    weight, out = call.args[0], call.outputs[0]
    labels = []
    for label in walk.value(weight).labels:
        if varying(label) == (1,):
            labels.append(label.reshape((1,) * (out.dim() - 1) + (-1,)))
        else:
            walk.pin(call, label, "rows are looked up by data")
    for other in call.tensors[1:]:
        for label in walk.value(other).labels:
            walk.pin(call, label, "tells which rows are looked up")
    facts, table = None, walk.value(weight).data
    silent = walk.empty(table, 1) if walk.with_facts and table is not None else None
    if silent is not None:
        facts = Facts.of(silent, torch.zeros(2, silent.numel(), dtype=torch.float64))
    walk.give(out, tuple(labels), None if facts is None else facts.spread(out.dim(), out.dim() - 1))
    for counted in call.outputs[1:]:
        walk.give(counted, ())


def sample(walk: Stream, call: Call) -> None:
    """Numbers are taken from between places in space that a grid names: beyond the border there are
    zeros, if not the border itself."""
    x, grid, _, padding = call.args[:4]
    for label in walk.value(grid).labels:
        walk.pin(call, label, "tells where numbers are taken from")
    couple(trailing(x.dim() - 2), "grid_sample", "zero" if padding == 0 else "all")(walk, call)


def unpool(walk: Stream, call: Call) -> None:
    """Numbers go where indices say, each channel's to its own; the rest is zero."""
    x = call.args[0]
    before = walk.value(x)
    walk.relabel(x, aligned(walk, call, x))
    space = 2 if call.op._schema.name == "aten::max_unpool2d" else 3
    couple(trailing(space), "max_unpool", "zero")(walk, call)
    x.__dict__["demp"] = before


POOLS = {f"aten::{name}{n}d": couple(dims(n), name, keeps)
         for n in (1, 2, 3)
         for name, dims, keeps in (("avg_pool", trailing, "average"),
                                   ("_adaptive_avg_pool", resized, "all"),
                                   ("adaptive_avg_pool", resized, "all"),
                                   ("adaptive_max_pool", resized, "all"))}  # fmt: skip
UPSAMPLE = {f"aten::{name}{n}d": couple(trailing(n), name, "all")
            for n in (1, 2, 3)
            for name in ("upsample_nearest", "_upsample_nearest_exact", "upsample_linear",
                         "upsample_bilinear", "upsample_bicubic", "upsample_trilinear",
                         "reflection_pad", "replication_pad")}  # fmt: skip
AA = {f"aten::_upsample_{k}2d_aa": couple(trailing(2), "interpolate", "all")
      for k in ("bilinear", "bicubic")}  # fmt: skip
MEANS = {f"aten::{name}": couple(named, name, "all")
         for name in ("mean", "amax", "amin", "max", "min", "sort", "topk", "cummax", "cummin",
                      "median", "nanmedian", "kthvalue", "mode")}  # fmt: skip
SUMS = {f"aten::{name}": couple(named, name, "zero")
        for name in ("sum", "norm", "linalg_vector_norm", "cumsum", "cumprod", "prod", "any",
                     "var", "std", "var_mean", "std_mean")}  # fmt: skip
OTHERS = {f"aten::{name}": couple(named, name, None)
          for name in ("logsumexp", "_softmax", "_safe_softmax",
                       "_log_softmax", "argmax", "argmin", "all")}  # fmt: skip

RULES: dict[str, Rule] = {
    **POOLS, **UPSAMPLE, **AA, **MEANS, **SUMS, **OTHERS,
    **dict.fromkeys(("aten::embedding", "aten::_embedding_bag",
                     "aten::_embedding_bag_forward_only"), embedding),
    **dict.fromkeys(("aten::grid_sampler_2d", "aten::grid_sampler_3d"), sample),
    **dict.fromkeys(("aten::max_unpool2d", "aten::max_unpool3d"), unpool),
}  # fmt: skip
