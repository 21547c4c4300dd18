"""Stillness: a mode in which dropout lets everything pass, and every other draw gives its mean, or
the first of the indices that it may be.

Two networks of different widths draw different masks from one seed; without the draws they can be
compared in train mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Still(TorchDispatchMode):
    """Every draw gives its mean, whatever its shape: a Bernoulli draw divided by it is one. A draw
    of indices gives the first, and moves nothing.

    `spread`: noise differs from row to row around its mean, for code that divides by how much it
    varies; along its first dim alone, which is hardly ever one of channels.
    """

    def __init__(self, spread: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spread = spread

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        mean = _MEANS.get(func._overloadpacket)
        if mean is None:
            return func(*args, **kwargs)
        drawn = func(*args, **kwargs)  # in the shape, dtype and device that it is to have
        drawn.copy_(mean(args, kwargs))
        if self.spread and drawn.dim() and func._overloadpacket in _NOISE:
            rows = torch.linspace(-0.25, 0.25, drawn.size(0), dtype=drawn.dtype)
            drawn += rows.to(drawn.device).view(-1, *[1] * (drawn.dim() - 1))
        return drawn


def _second(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, default: Any) -> Any:
    return args[1] if len(args) > 1 else kwargs.get(name, default)


def _middle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    low, high = _second(args, kwargs, "from", 0.0), args[2] if len(args) > 2 else 1.0
    return torch.tensor((low + kwargs.get("to", high)) / 2)


def _chance(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of Bernoulli draws: given as a number, as a tensor, or by the tensor that is drawn from."""
    chance = _second(args, kwargs, "p", None)
    return torch.as_tensor(args[0] if chance is None else chance)


def _first(args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    """Of draws of indices by their weights: the heaviest ones, over again where more are drawn."""
    ranked = args[0].argsort(dim=-1, descending=True, stable=True)
    return ranked[..., torch.arange(args[1]) % ranked.size(-1)]


def _low(args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    return torch.tensor(args[0] if isinstance(args[1], int) else 0)


_NOISE = {aten.rand, aten.rand_like, aten.randn, aten.randn_like, aten.normal, aten.normal_}
_MEANS: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], Any]] = {
    aten.bernoulli: _chance,
    aten.bernoulli_: lambda args, kwargs: torch.as_tensor(_second(args, kwargs, "p", 0.5)),
    **dict.fromkeys((aten.rand, aten.rand_like), lambda *_: torch.tensor(0.5)),
    **dict.fromkeys((aten.randn, aten.randn_like), lambda *_: torch.tensor(0.0)),
    aten.uniform_: _middle,
    aten.multinomial: _first,
    aten.randint: _low,
    aten.randperm: lambda args, _: torch.arange(args[0]),
    **dict.fromkeys((aten.normal, aten.poisson), lambda args, _: torch.as_tensor(args[0])),
    aten.normal_: lambda args, kwargs: torch.as_tensor(_second(args, kwargs, "mean", 0.0)),
    aten.exponential_: lambda args, kwargs: torch.tensor(1 / _second(args, kwargs, "lambd", 1.0)),
}
