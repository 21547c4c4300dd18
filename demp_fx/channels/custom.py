"""Operations that are no ATen ops: autograd functions and recurrent layers; and what a schema says
is written."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from demp_fx.tracing.autograd import Apply


def function_name(function: type[Function]) -> str:
    """The name under which the table of rules knows an autograd function."""
    return f"{function.__module__}.{function.__qualname__}"


class FunctionOp:
    """An autograd function in the place of an ATen op: a name, and something to call."""

    is_view = False
    tags: tuple[torch.Tag, ...] = ()

    def __init__(self, apply: Apply) -> None:
        self.apply = apply
        self._schema = SimpleNamespace(name=function_name(apply.function), arguments=[])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.apply(*args, **kwargs)

    def __str__(self) -> str:
        return str(self._schema.name)


_CELLS = {nn.LSTMCell, nn.GRUCell, nn.RNNCell}
_WEIGHTS = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}


class LayerOp:
    """A recurrent layer in the place of an ATen op: it is met as a whole."""

    NAME = "torch.nn.RNNBase"
    is_view = False
    tags: tuple[torch.Tag, ...] = ()

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._schema = SimpleNamespace(name=self.NAME, arguments=[])

    @staticmethod
    def takes(layer: nn.Module | None) -> bool:
        """Whether a layer is one; of cells those of torch, with weights of their own: the ops of
        others are followed."""
        if isinstance(layer, nn.RNNCellBase):
            return type(layer) in _CELLS and layer._parameters.keys() >= _WEIGHTS
        return isinstance(layer, nn.RNNBase)

    def macs(self, x: Any) -> int:
        """Multiplications: each weight meets every step of every sequence once."""
        steps = x.numel() // max(1, x.size(-1)) if isinstance(x, Tensor) else 0
        return steps * sum(p.numel() for p in self.layer.parameters() if p.dim() > 1)

    def __str__(self) -> str:
        return type(self.layer).__name__


def written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to. Running statistics of a norm are not counted:
    nothing that is known of them is lost."""
    places = _written(op) if isinstance(op, torch._ops.OpOverload) else ()
    found = [args[k] if k < len(args) else kwargs.get(name) for k, name in places]
    return [t for t in found if isinstance(t, Tensor)]


@functools.cache
def _written(op: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(op._schema.arguments)
    return tuple(
        (k, a.name)
        for k, a in arguments
        if a.alias_info is not None and a.alias_info.is_write and not a.name.startswith("running_")
    )
