"""Kill channels of a network on purpose, and measure how far two results are apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def kill_norms(
    model: nn.Module, fraction: float, seed: int, keep_shift: bool = False
) -> dict[str, Tensor]:
    """Zero the scale of a random `fraction` of the channels of every BatchNorm, and their shift
    unless `keep_shift`: then such a channel is a constant that need not be zero.

    Everything else about the layer is made as uneven as training makes it: running statistics,
    scales and shifts are redrawn, so no two channels are alike. Returns the dead ones by layer.
    """
    rng = torch.Generator().manual_seed(seed)
    dead = {}
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm):
            continue
        width = norm.num_features
        _randomise(norm, rng)
        dead[name] = torch.randperm(width, generator=rng)[: round(width * fraction)]
        norm.weight[dead[name]] = 0.0
        if not keep_shift:
            norm.bias[dead[name]] = 0.0
    return dead


@torch.no_grad()
def kill_channels(model: nn.Module, dead: dict[str, Tensor], seed: int = 0) -> None:
    """Zero scale and shift of the named channels of the named norms, and redraw all others."""
    rng = torch.Generator().manual_seed(seed)
    for name, norm in model.named_modules():
        if isinstance(norm, _BatchNorm):
            _randomise(norm, rng)
            if name in dead:
                norm.weight[dead[name]] = 0.0
                norm.bias[dead[name]] = 0.0


@torch.no_grad()
def never_fire(model: nn.Module, layers: list[str], fraction: float, seed: int) -> None:
    """Push the bias of a random `fraction` of these layers' channels far below zero: the ReLU
    that follows never opens on ordinary data, though nothing in the weights proves it."""
    rng = torch.Generator().manual_seed(seed)
    for name in layers:
        bias = model.get_parameter(f"{name}.bias")
        dead = torch.randperm(len(bias), generator=rng)[: round(len(bias) * fraction)]
        bias[dead] = -1e3


def without_chance(model: nn.Module) -> nn.Module:
    """Dropout and stochastic depth off, so that train mode can be compared number by number."""
    for module in model.modules():
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0
    return model


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    if result.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(result.shape)}, {tuple(expected.shape)}")
    result, expected = result.detach(), expected.detach()
    return float((result - expected).abs().max() / expected.abs().max())


def _randomise(norm: _BatchNorm, rng: torch.Generator) -> None:
    norm.running_mean.normal_(0.0, 0.1, generator=rng)
    norm.running_var.uniform_(0.5, 2.0, generator=rng)
    norm.weight.uniform_(0.5, 1.5, generator=rng)
    norm.bias.normal_(0.0, 0.3, generator=rng)
