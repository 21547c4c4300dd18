"""Stillness: a mode in which dropout and stochastic depth let everything pass.

Two networks of different widths draw different masks from one seed; without the draws they can be
compared in train mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Still(TorchDispatchMode):
    """Every Bernoulli draw gives its mean, so that a draw divided by it is one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if func is aten.bernoulli_.float:
            return args[0].fill_(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        if func is aten.bernoulli.p:
            return torch.full_like(args[0], args[1])
        return func(*args, **kwargs)
