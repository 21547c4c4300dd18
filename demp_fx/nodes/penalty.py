"""The penalty node: in front of a layer, it adds lambda * sign(parameter) to a gradient.

That is the gradient of lambda * sum |parameter|. It goes through the optimizer like the loss's own
(so Adam preconditions it), and needs no term in the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Penalty(torch.autograd.Function):
    """Identity on `x`; adds `strength * sign(parameter)` to the gradient of `parameter`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, parameter: Tensor, strength: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])
        ctx.passes = inputs[0].requires_grad

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        parameter, strength = ctx.saved_tensors
        pull = parameter.sign() * strength.to(parameter.dtype)
        return grad if ctx.passes else None, pull, None


class Penalty(nn.Module):
    """Identity on the input of the layer that holds the penalised parameter."""

    def forward(self, x: Tensor, parameter: Tensor, strength: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and parameter.requires_grad):
            return x
        return _Penalty.apply(x, parameter, strength)  # type: ignore[no-any-return, no-untyped-call]
