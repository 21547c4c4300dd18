"""Recurrent layers: a unit is a channel of all its gates, of the state that they make and read in
every step, and of what the layer gives.

A unit that starts at zero stays there if nothing is ever added to it: the cell gate of an LSTM, the
new gate of a GRU, all of a plain RNN. All layers and directions have equally many units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from demp_fx.channels.blanks import adopt
from demp_fx.channels.constraints import Blocks, Fold, Read
from demp_fx.channels.custom import LayerOp
from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import along, same_label, varying
from demp_fx.channels.rules.contract import UNLABELLED
from demp_fx.channels.rules.operand import Operand
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.value import Call
from demp_fx.trees import tensors_of

KEPT = "belongs to a recurrent layer that is not looked into"
GIVEN = "is the state of a recurrent layer, which starts from one that no parameter makes"
WIDER = "is projected in a recurrent layer, which has to be wider than what it is projected to"
Reads = dict[str, Tensor | None]  # the weights of a cell, on meta where there are no numbers


@dataclass(frozen=True)
class Cell:
    """One layer in one direction: its `units`, the `state` that it hands on (those, or a projection
    of them), and which of both are always zero (`still`, `zero`)."""

    units: Tensor
    still: Tensor
    state: Tensor
    zero: Tensor


def recurrent(walk: Stream, call: Call) -> None:
    """Each layer reads the one before, or the input, once in each direction."""
    op, x = call.op, call.args[0]
    assert isinstance(op, LayerOp)
    layer: Any = op.layer
    if isinstance(layer, nn.RNNCellBase):
        _step(walk, call)
        return
    names = layer._flat_weights_names
    if not isinstance(x, Tensor) or not layer._parameters.keys() >= set(names):
        _keep(walk, call, layer)
        walk.system.multiply(op.macs(x))
        return
    source, known = _input(walk, call)
    starts, rank = tensors_of(call.args[1:]), call.outputs[1].dim()
    still = walk.with_facts and all(_is_zero(walk, start) for start in starts)
    cells: list[Cell] = []
    for number in range(layer.num_layers):
        suffixes = [f"_l{number}", f"_l{number}_reverse"][: 1 + layer.bidirectional]
        found = [_cell(walk, call, suffix, source, known, still) for suffix in suffixes]
        cells += found
        source = torch.cat([cell.state for cell in found])
        known = _zeros(torch.cat([cell.zero for cell in found]))
    assert source is not None
    _give(walk, call.outputs[0], source, known)
    ends = ("state", "zero"), ("units", "still")  # of both an LSTM gives the last one
    for k, (name, dead) in enumerate(ends):
        rows = torch.stack([getattr(cell, name) for cell in cells])
        zero = torch.stack([getattr(cell, dead) for cell in cells])
        label = _end(rows, rank)
        if k + 1 < len(call.outputs):
            _give(walk, call.outputs[k + 1], label, _zeros(_end(zero, rank)))
        if len(cells) > 1:
            walk.system.blocks.append(Blocks(rows, call.site))
        if k < len(starts):
            _begin(walk, call, starts[k], label)


def _keep(walk: Stream, call: Call, layer: nn.Module) -> None:
    for tensor in (*call.tensors, *layer.parameters()):
        for label in walk.value(tensor).labels:
            walk.pin(call, label, KEPT)
    for out in call.outputs:
        walk.give(out, ())


def _input(walk: Stream, call: Call) -> tuple[Tensor | None, Facts | None]:
    """The channels that come in, and what is known of them."""
    x = call.args[0]
    for label in walk.value(x).labels:
        if varying(label) != (x.dim() - 1,):
            walk.pin(call, label, "it goes into a recurrent layer together with another axis")
    facts = walk.value(x).facts if walk.with_facts else None
    known = None if facts is None else facts.along(x.dim() - 1, x.size(-1))
    return Operand(x, "?" * (x.dim() - 1) + "i").single(walk, "i"), known


def _step(walk: Stream, call: Call) -> None:
    """One step of a cell that code calls in a loop of its own."""
    source, known = _input(walk, call)
    starts = tensors_of(call.args[1:])
    units, weights = _tied(walk, call, "")
    size = units.numel()
    zeros = [_zero_channels(walk, start) for start in starts] or [torch.ones(size).bool()]
    zero = torch.zeros(size, dtype=torch.bool)
    if walk.with_facts and _have_numbers(weights):
        zero = _unmoved(weights, _gates(call), _dead(known, weights), zeros[0])
        if _gates(call) > 1:
            zero &= zeros[-1]
    _read(walk, call, "weight_ih", source, units, known)
    _read(walk, call, "weight_hh", units, units, _zeros(zeros[0]))
    for start in starts:
        _begin(walk, call, start, along(units, start.dim(), start.dim() - 1))
    for out in call.outputs:
        _give(walk, out, units, _zeros(zero))


def _zero_channels(walk: Stream, start: Tensor) -> Tensor:
    facts = walk.value(start).facts
    along_units = None if facts is None else facts.along(start.dim() - 1, start.size(-1))
    return torch.zeros(start.size(-1)).bool() if along_units is None else along_units.zero


def _is_zero(walk: Stream, start: Tensor) -> bool:
    facts = walk.value(start).facts
    return facts is not None and bool(facts.zero.all())


def _zeros(zero: Tensor) -> Facts | None:
    return Facts.zeros(zero) if bool(zero.any()) else None


def _end(rows: Tensor, rank: int) -> Tensor:
    """One row for each layer and direction, as in the last state: (rows, batch, units)."""
    return rows.unsqueeze(1) if rank == 3 else rows


def _give(walk: Stream, out: Tensor, label: Tensor, facts: Facts | None) -> None:
    if label.dim() == 1:
        label = along(label, out.dim(), out.dim() - 1)
        facts = None if facts is None else facts.spread(out.dim(), out.dim() - 1)
    walk.give(out, (label,), facts)


def _begin(walk: Stream, call: Call, start: Tensor, label: Tensor) -> None:
    """The state that the first step reads has the units' channels."""
    value = walk.value(start)
    dims = set(varying(label))
    if not value.labels and dims <= value.blank:
        adopt(walk, start, *((label,) if dims else ()))
        return
    if len(value.labels) == 1 and value.labels[0].shape == label.shape:
        if not same_label(value.labels[0], label):
            walk.system.same(value.labels[0], label, call.site)
        return
    for x in (label, *value.labels):
        walk.pin(call, x, GIVEN)


def _gates(call: Call) -> int:
    """How many gates there are: the third of several makes what is added to the state."""
    layer: Any = call.op.layer  # type: ignore[attr-defined]
    first = layer.weight_ih if isinstance(layer, nn.RNNCellBase) else layer.weight_ih_l0
    return int(first.size(0) // layer.hidden_size)


def _cell(
    walk: Stream, call: Call, suffix: str, source: Tensor | None, known: Facts | None, still: bool
) -> Cell:
    """`source`: the channels that come in, of which facts are `known`; `still`: the state starts at
    zero."""
    units, weights = _tied(walk, call, suffix)
    layer: Any = call.op.layer  # type: ignore[attr-defined]
    state = _atoms(walk, layer, "weight_hr" + suffix, 0) if layer.proj_size else units
    zero, handed = torch.zeros(units.numel()).bool(), torch.zeros(state.numel()).bool()
    if still and _have_numbers(weights):
        zero, handed = _still(weights, _gates(call), _dead(known, weights))
    _read(walk, call, "weight_ih" + suffix, source, units, known)
    _read(walk, call, "weight_hh" + suffix, state, units, _zeros(handed))
    if layer.proj_size:
        walk.pin(call, units, WIDER)
        _read(walk, call, "weight_hr" + suffix, units, state, _zeros(zero))
    return Cell(units, zero, state, handed)


def _tied(walk: Stream, call: Call, suffix: str) -> tuple[Tensor, Reads]:
    """The units of a cell, tied to the rows of all gates; and its weights."""
    layer: Any = call.op.layer  # type: ignore[attr-defined]
    weights = {
        name: walk.value(getattr(layer, name + suffix)).data
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        if layer._parameters.get(name + suffix) is not None
    }
    gates = _gates(call)
    units = _atoms(walk, layer, "weight_ih" + suffix, 0).reshape(gates, -1)[0]
    for name in weights.keys() - {"weight_hr"}:
        for gate in _atoms(walk, layer, name + suffix, 0).reshape(gates, -1):
            walk.system.same(gate, units, call.site)
    return units, weights


def _atoms(walk: Stream, layer: nn.Module, name: str, dim: int) -> Tensor:
    """The atoms along one dim of a weight; of an axis of one they are no atoms."""
    weight = layer._parameters[name]
    assert weight is not None
    found = [x.reshape(-1) for x in walk.value(weight).labels if varying(x) == (dim,)]
    return found[0] if found else torch.zeros(weight.size(dim), dtype=torch.int64)


def _have_numbers(weights: Reads) -> bool:
    return not any(w is None or w.is_meta for w in weights.values())


def _dead(known: Facts | None, weights: Any) -> Tensor:
    """The inputs that are zero."""
    return torch.zeros(weights["weight_ih"].size(1)).bool() if known is None else known.zero


def _unmoved(weights: Any, gates: int, dead: Tensor, handed: Tensor) -> Tensor:
    """The units to which nothing is added: no input but `dead` ones, no bias, and no number of the
    state but those that are zero (`handed`)."""

    def rows(name: str) -> Tensor:
        part: Tensor = weights[name].cpu().unflatten(0, (gates, -1))
        return part[2 if gates > 1 else 0]

    moved = (rows("weight_ih")[:, ~dead] != 0).any(1) | (rows("weight_hh")[:, ~handed] != 0).any(1)
    for name in weights.keys() & {"bias_ih", "bias_hh"}:
        moved |= rows(name) != 0
    return ~moved


def _still(weights: Any, gates: int, dead: Tensor) -> tuple[Tensor, Tensor]:
    """The units, and the numbers of the state, that stay zero once they are, when the inputs `dead`
    do."""
    projection = weights.get("weight_hr")
    zero = torch.ones(weights["weight_ih"].size(0) // gates, dtype=torch.bool)
    while True:
        handed = zero
        if projection is not None:
            handed = ~(projection.cpu()[:, ~zero] != 0).any(1)
        fewer = zero & _unmoved(weights, gates, dead, handed)
        if torch.equal(fewer, zero):
            return zero, handed
        zero = fewer


def _read(
    walk: Stream, call: Call, name: str, source: Tensor | None, made: Tensor, facts: Facts | None
) -> None:
    """What one of the weights reads in each step, to make other channels."""
    layer: Any = call.op.layer  # type: ignore[attr-defined]
    weight, x = getattr(layer, name), call.args[0]
    columns, value = _atoms(walk, layer, name, 1), walk.value(weight)
    if source is None:
        walk.pin(call, columns, UNLABELLED)
        source = columns
    else:
        walk.system.same(source, columns, call.site)
    silent = walk.empty(value.data, 1) if walk.with_facts and value.data is not None else None
    axis, bias = walk.axis_of(columns), getattr(layer, name.replace("weight", "bias"), None)
    fold = None
    if axis is not None and axis.owner in walk.params and name.startswith("weight_ih"):
        fold = Fold(axis.owner, 1, None if bias is None else walk.name_of(bias), padded=False)
    work = weight.numel() * (x.numel() // max(1, x.size(-1)))
    walk.system.flow.append(
        Read(source, (made,), facts, silent, fold, work, weight.numel(), call.site)
    )
    walk.system.multiply(work, source, made)


RULES: dict[str, Rule] = {LayerOp.NAME: recurrent}
