"""Shares: numbers that sum to one along the last dim, as attention weights do.

What they average keeps its constants: a channel that is one number at every place stays that
number. Dropout between counts as letting everything pass, as it does everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from demp_fx.channels.value import Call, Value

aten = torch.ops.aten
_SOFTMAX = {aten._softmax.default, aten.softmax.int}
# Where a mask leaves nothing of a row, this one gives zeros.
_SAFE = {aten._safe_softmax.default}
_ROWS = {"aten::view", "aten::_unsafe_view", "aten::_reshape_alias", "aten::expand",
         "aten::unsqueeze", "aten::clone", "aten::_to_copy", "aten::detach", "aten::alias",
         "aten::native_dropout"}  # fmt: skip


def gives_shares(call: Call, first: Value, masked: bool) -> bool:
    """Whether the result of a call sums to one along its last dim; `first`: what is known of its
    first operand, `masked`: whether a mask may leave nothing of a row."""
    if call.op in _SOFTMAX or (call.op in _SAFE and not masked):
        return bool(call.args[1] % call.tensors[0].dim() == call.tensors[0].dim() - 1)
    if not first.shares or call.op._schema.name not in _ROWS:
        return False
    return call.outputs[0].shape[-1:] == call.tensors[0].shape[-1:]
