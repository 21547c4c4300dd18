"""What a node of a graph calls."""

from __future__ import annotations

from typing import Any

from torch import fx


def called(node: fx.Node) -> Any:
    """The function that a node calls, or the name of the method; None of a module, an input or a
    parameter, which may have the name of any method (`self.mean`, `size`)."""
    return node.target if node.op in ("call_function", "call_method") else None
