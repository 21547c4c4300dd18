"""Recurrent layers: every gate and every step takes all that the layer keeps; of its input it needs
what is not dead."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from demp_fx.channels.custom import LayerOp
from demp_fx.channels.labels import varying
from demp_fx.channels.rules.operand import Operand
from demp_fx.channels.stream import Rule, Stream
from demp_fx.channels.system import Fold, Read
from demp_fx.channels.value import Call

KEPT = "belongs to a recurrent layer, of which only the input is narrowed"


def recurrent(walk: Stream, call: Call) -> None:
    """The first layer's weights read the last dim of the input, once in each direction."""
    op = call.op
    assert isinstance(op, LayerOp)
    x = call.args[0]
    letters = "?" * (x.dim() - 1) + "i" if isinstance(x, Tensor) else ""
    source = Operand(x, letters).single(walk, "i") if letters else None
    for tensor in call.tensors:
        for label in walk.value(tensor).labels:
            if source is None or tensor is not x or varying(label) != (x.dim() - 1,):
                walk.pin(call, label, "it goes into a recurrent layer, which is not narrowed")
    work = op.macs(x)
    for name, parameter in op.layer.named_parameters():
        labels = {varying(label): label.reshape(-1) for label in walk.value(parameter).labels}
        columns = labels.pop((1,), None) if name.startswith("weight_ih_l0") else None
        for label in labels.values():
            walk.pin(call, label, KEPT)
        if columns is not None and source is not None:
            work -= _read(walk, call, name, parameter, source, columns)
        elif columns is not None:
            walk.pin(call, columns, KEPT)
    walk.system.multiply(work)
    for out in call.outputs:
        walk.give(out, ())


def _read(
    walk: Stream, call: Call, name: str, parameter: Tensor, source: Tensor, columns: Tensor
) -> int:
    """What one of the weights reads of the input; returns its multiplications."""
    layer: Any = call.op.layer  # type: ignore[attr-defined]
    x: Tensor = call.args[0]
    walk.system.same(source, columns, call.site)
    facts = walk.value(x).facts if walk.with_facts else None
    facts = None if facts is None else facts.along(x.dim() - 1, source.numel())
    value, fold = walk.value(parameter), None
    silent = walk.empty(value.data, 1) if walk.with_facts and value.data is not None else None
    axis = walk.axis_of(columns)
    if axis is not None and axis.owner in walk.params:
        bias = getattr(layer, name.replace("weight", "bias"), None)
        fold = Fold(axis.owner, 1, None if bias is None else walk.name_of(bias), padded=False)
    rows = tuple(x.reshape(-1) for x in value.labels if varying(x) == (0,))
    work = parameter.numel() * (x.numel() // x.size(-1))
    walk.system.flow.append(
        Read(source, rows, facts, silent, fold, work, parameter.numel(), call.site)
    )
    walk.system.multiply(work, source)
    return work


RULES: dict[str, Rule] = {LayerOp.NAME: recurrent}
