"""What a node of a graph calls, and what of that makes tensors of sizes that the code names."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

aten = torch.ops.aten
# From the first argument on, and behind the tensor that they are made like.
MADE: set[Any] = {torch.zeros, torch.ones, torch.full, torch.empty, torch.rand, torch.randn,
                  aten.zeros.default, aten.ones.default, aten.full.default,
                  aten.empty.memory_format, aten.rand.default, aten.randn.default}  # fmt: skip
MADE_LIKE: set[Any] = {"expand", "new_zeros", "new_ones", "new_full", "new_empty",
                       aten.expand.default, aten.new_zeros.default, aten.new_ones.default,
                       aten.new_full.default, aten.new_empty.default}  # fmt: skip
# Numbers that stand in the code.
LITERALS: set[Any] = {torch.linspace, torch.logspace, torch.arange, torch.tensor,
                      aten.linspace.default, aten.logspace.default, aten.arange.default,
                      aten.arange.start, aten.arange.start_step}  # fmt: skip

ASKS: set[Any] = {"size", getattr, aten.sym_size.int}  # what asks for sizes
# What reads no more of a tensor than that.
SIZES: set[Any] = {*ASKS, "dim", "numel", "ndimension"}
# What asks for the product of all sizes, of a tensor or of a list of them.
COUNTS: set[Any] = {"numel", "nelement", torch.numel}


def called(node: fx.Node) -> Any:
    """The function that a node calls, or the name of the method; None of a module, an input or a
    parameter, which may have the name of any method (`self.mean`, `size`)."""
    return node.target if node.op in ("call_function", "call_method") else None


def perform(node: fx.Node, root: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a node of the graph of `root` gives for these arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    run: Any = root.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return run(*args, **kwargs)
