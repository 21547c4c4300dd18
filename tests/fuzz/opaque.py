"""What an analysis cannot look into, or rarely meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.block import Block, Place


class Straight(torch.autograd.Function):
    """A clamp that lets every gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-1, 1) + 0.1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


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


@torch.library.custom_op("demp_fuzz::lift_", mutates_args=("x",))
def lift_(x: Tensor) -> None:
    """In place, through a view if need be, and without a fake."""
    x.add_(0.2)


def _lifted(x: Tensor) -> Tensor:
    y = x.clone()
    lift_(y.detach()[:, :1])
    return y


def _shifted(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., 1:] = x[..., :-1]
    return y + 0.5 * x


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., 0] = (2 * y).mean(-1)
    return y * x


class Sorted(torch.autograd.Function):
    """Two results, one of them of integers; other packages' functions leave torch like this one."""

    @staticmethod
    def forward(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        values, places = x.sort(dim)
        return values, places

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return torch.zeros_like(grad).scatter(ctx.dim, places, grad), None


class Steered(nn.Module):
    """Python looks at the numbers: it cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.detach().sum()) > 1e9 else x - x.mean(1, keepdim=True)


OPAQUE: dict[str, Callable[[Tensor], Tensor]] = {
    "autograd": Straight.apply,
    "sorted": lambda x: Sorted.apply(x, 1)[0],
    "custom_op": tilt,
    "written": _lifted,
    "module": Steered(),
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False),
    "shifted": _shifted,
    "assigned": _assigned,
    "added": lambda x: x.new_zeros(x.shape).index_add(-1, torch.arange(x.size(-1)) // 2, x),
    "paired": lambda x: x.index_add(0, torch.arange(x.size(0)) // 2, 0.5 * x),
    "gathered": lambda x: x.gather(-1, x.argsort(-1)),
    "scattered": lambda x: torch.zeros_like(x).scatter_add(-1, x.argsort(-1), x),
    "masked": lambda x: x.index_put((x > 0.1,), torch.ones(x.shape, dtype=x.dtype).mean()),
    "expanded": lambda x: x + x.mean(-1, keepdim=True).expand_as(x).tanh(),
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
