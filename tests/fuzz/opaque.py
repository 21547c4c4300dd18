"""What an analysis cannot look into, or rarely meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.block import Block, Place


class Double(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x + 0.1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@torch.library.custom_op("demp_fuzz::tilt", mutates_args=())
def tilt(x: Tensor) -> Tensor:
    """Nobody has told demp_fx what this does: it adds the first channel to all."""
    return x + x[:, :1]


@tilt.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _tilt_backward(ctx: Any, grad: Tensor) -> Tensor:
    result = grad.clone()
    result[:, :1] += grad.sum(1, keepdim=True)
    return result


tilt.register_autograd(_tilt_backward)


class Steered(nn.Module):
    """Python looks at the numbers: it cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.detach().sum()) > 1e9 else x - x.mean(1, keepdim=True)


OPAQUE: dict[str, Callable[[Tensor], Tensor]] = {
    "autograd": Double.apply,
    "custom_op": tilt,
    "module": Steered(),
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False),
    "fourier": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=-1), n=x.shape[-1], dim=-1),
    "complex": lambda x: torch.view_as_real(torch.complex(x, -x)).sum(-1),
}


class Opaque(Block):
    """What an analysis cannot look into, or rarely meets."""

    draws = {"how": st.sampled_from(list(OPAQUE))}

    def __init__(self, at: Place, how: str = "autograd") -> None:
        super().__init__(at)
        self.how = how
        self.steered = Steered() if how == "module" else None

    def forward(self, x: Tensor) -> Tensor:
        return self.steered(x) if self.steered is not None else OPAQUE[self.how](x)
