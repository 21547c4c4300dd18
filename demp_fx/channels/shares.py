"""Shares: numbers that sum to one along some dim, as attention weights do.

What they average keeps its constants: a channel that is one number at every place stays that
number. Dropout between counts as letting everything pass, as it does everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from demp_fx.channels.labels import along, compress, reshaped, varying

if TYPE_CHECKING:
    from demp_fx.channels.running import Running
    from demp_fx.channels.value import Call, Value

aten = torch.ops.aten
_SOFTMAX = {aten._softmax.default, aten.softmax.int}
# Where a mask leaves nothing of a row, this one gives zeros.
_SAFE = {aten._safe_softmax.default}
_COPIES = {"aten::clone", "aten::_to_copy", "aten::detach", "aten::alias", "aten::native_dropout"}
_RESHAPES = {"aten::view", "aten::_unsafe_view", "aten::_reshape_alias"}


def shares_of(call: Call, first: Value, running: Running) -> int | None:
    """The dim along which the result of a call sums to one, if there is any; `first`: what is known
    of its first operand, `running`: the node that it is in."""
    if call.op in _SOFTMAX or (call.op in _SAFE and not running.masked):
        dim: int = call.args[1] % call.tensors[0].dim()
        return dim
    if first.shares is None or call.op._schema.name in _COPIES:
        return first.shares
    return _moved(call, first.shares) if call.op.is_view else None


def _moved(call: Call, dim: int) -> int | None:
    """Where a movement has taken a dim; None where it is in pieces."""
    x, out, size = call.tensors[0], call.outputs[0], call.tensors[0].size(dim)
    places = along(torch.arange(size), x.dim(), dim)
    if call.op._schema.name in _RESHAPES:
        moved = reshaped(places, x.shape, out.shape)
    else:
        moved = call.op(places.expand(x.shape), *call.args[1:], **call.kwargs)
    if not isinstance(moved, torch.Tensor):
        return None
    dims = varying(line := compress(moved))
    return dims[0] if len(dims) == 1 and line.numel() == size else None
