"""The noise node: in front of an activation, it finds out which neurons are alive.

Noise is added to the parameters after the optimizer's step, and to those of living neurons alone.
A neuron lives if the task loss has a gradient where its activation begins; behind a ReLU that never
fired that gradient is exactly zero, whatever a penalty does to the parameters. The node hands the
gradient on, and leaves its largest magnitude in each channel as the gradient of a buffer: so it
adds up over the backward passes of one optimizer step, and survives `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Probe(torch.autograd.Function):
    """Identity on `x`; the gradient of `probe` is the largest |gradient of x| in each channel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, probe: Tensor, dim: int, copy: bool) -> Tensor:
        return x.clone() if copy else x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dim = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rest = [d for d in range(grad.dim()) if d != ctx.dim]
        # twice as fast as one pass over |grad|, and ten times as fast as its norm
        peak = torch.maximum(grad.amax(rest), -grad.amin(rest)) if rest else grad.abs()
        return grad, peak.to(torch.float32), None, None


class Noise(nn.Module):
    """Identity on an activation's input, with `channels` on `dim`.

    `copy`: hand on a copy, because what follows works in place.
    """

    probe: Tensor

    def __init__(self, channels: int, dim: int, copy: bool, device: torch.device) -> None:
        super().__init__()
        self.dim, self.copy = dim, copy
        self.register_buffer("probe", torch.zeros(channels, device=device), persistent=False)
        self.probe.requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return x
        return _Probe.apply(x, self.probe, self.dim, self.copy)  # type: ignore[no-any-return, no-untyped-call]

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
