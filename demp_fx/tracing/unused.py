"""What a trace leaves behind that nobody reads: the rest of decisions and of checks."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from demp_fx.tracing.augmented import MOVES, is_write

# Without a user these leave no trace: the rest of control flow that has been decided.
_PURE: set[Any] = {getattr, operator.getitem, operator.not_, operator.and_, operator.or_}
_PURE |= {operator.eq, operator.ne, operator.lt, operator.gt, operator.le, operator.ge}
_PURE |= {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod}
# Nor does what only moves numbers that nobody reads: it may tell of sizes that happen to be alike.
_PURE |= {*MOVES, "type"}


def drop_unused(graph: fx.Graph, checks: set[fx.Node]) -> None:
    """Erase the nodes without a user that do nothing else; `checks`: those that a check has looked
    at, which go with what leads to them."""
    checks = set(checks)
    for node in reversed(graph.nodes):
        node.meta.pop("is_wrapped", None)  # else the code would wrap torch's functions
        calls = node.op in ("call_function", "call_method")
        checked = node in checks and not is_write(node)
        pure = calls and (node.target in _PURE or checked)
        if not node.users and (node.op == "get_attr" or pure):
            checks.update(node.all_input_nodes if checked else ())
            graph.erase_node(node)
