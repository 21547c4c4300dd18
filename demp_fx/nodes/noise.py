"""The noise node: in front of an activation, it finds out which neurons are alive.

Noise is added to the parameters after the optimizer's step, and to those of living neurons alone.
A neuron lives if the task loss has a gradient where its activation begins; behind a ReLU that never
fired that gradient is exactly zero, whatever a penalty does to the parameters. The node hands the
gradient on, and leaves its sum in each channel as the gradient of a buffer, as if that were a bias:
so it adds up over the backward passes of one optimizer step, and survives `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Probe(torch.autograd.Function):
    """Identity on `x`; `probe` gets the gradient that a bias in its place would get."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, probe: Tensor, dim: int, overwritten: bool) -> Tensor:
        # what autograd takes for a view must not be written to; a compiler leaves out the copy
        return x.clone() if overwritten else x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dim = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rest = [d for d in range(grad.dim()) if d != ctx.dim]
        total = grad.sum(rest, dtype=torch.float32) if rest else grad.to(torch.float32)
        return grad, total, None, None


class _Overwritten(_Probe):
    """The same in front of an activation that works in place: itself an operation in place, one
    that changes nothing, so that nothing is copied."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, probe: Tensor, dim: int, overwritten: bool) -> Tensor:
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_dirty(inputs[0])
        ctx.dim = inputs[2]


class Noise(nn.Module):
    """Identity on an activation's input, with `channels` on `dim`.

    `overwritten`: whether what follows works in place.
    """

    probe: Tensor

    def __init__(self, channels: int, dim: int, overwritten: bool, device: torch.device) -> None:
        super().__init__()
        self.dim, self.overwritten = dim, overwritten
        self.register_buffer("probe", torch.zeros(channels, device=device), persistent=False)
        self.probe.requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return x
        eager = self.overwritten and not torch.compiler.is_compiling()
        function = _Overwritten if eager else _Probe
        return function.apply(x, self.probe, self.dim, self.overwritten)  # type: ignore[no-any-return, no-untyped-call]

    def live(self) -> Tensor | None:
        """Which channels have had a gradient since `reset`; None where nothing was recorded.

        Bool, one a channel. A gradient that is not a number counts as one.
        """
        grad = self.probe.grad
        return None if grad is None else grad != 0

    def reset(self) -> None:
        """Forget the gradients seen so far."""
        self.probe.grad = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Noise:
        """Move to another device; the probe stays a float32 leaf that takes gradients."""
        moved = fn(self.probe.detach())
        self.probe = moved.to(torch.float32).detach().requires_grad_()
        return self

    def extra_repr(self) -> str:
        return f"channels={self.probe.numel()}, dim={self.dim}"
