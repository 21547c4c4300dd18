"""Ways in which channels die: in the weights, or only on data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Chosen = Callable[[int], Tensor]

NORM_NAMES = ("weight", "bias", "gamma", "beta")


@torch.no_grad()
def unsettle(model: nn.Module, rng: torch.Generator) -> None:
    """Make every parameter and running statistic as uneven as training makes it."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if p.dim() == 1 and name in ("weight", "gamma"):
                p.uniform_(0.5, 1.5, generator=rng)
            elif p.dim() <= 1:
                p.normal_(0.0, 0.4, generator=rng)
        for name, b in module._buffers.items():
            if name == "running_mean" and b is not None:
                b.normal_(0.0, 0.3, generator=rng)
            elif name == "running_var" and b is not None:
                b.uniform_(0.5, 2.0, generator=rng)


def _vectors(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    own = [(n, p) for n, p in module._parameters.items() if p is not None]
    return [(n, p) for n, p in own if p.dim() == 1]


def _matrices(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    own = [(n, p) for n, p in module._parameters.items() if p is not None]
    return [(n, p) for n, p in own if p.dim() > 1]


def _is_scale(module: nn.Module) -> bool:
    return not _matrices(module) and bool(_vectors(module))


def zero_scales(module: nn.Module, chosen: Chosen) -> None:
    """A norm's scale and shift are zero: the channel is zero behind it."""
    if _is_scale(module):
        for _, p in _vectors(module):
            p[chosen(p.numel())] = 0.0


def constant_scales(module: nn.Module, chosen: Chosen) -> None:
    """A norm's scale is zero, its shift is not: the channel is constant behind it."""
    for name, p in _vectors(module) if _is_scale(module) else ():
        if name in ("weight", "gamma"):
            p[chosen(p.numel())] = 0.0


def zero_rows(module: nn.Module, chosen: Chosen) -> None:
    """A layer's filters are zero, and their bias with them."""
    for _, p in _matrices(module):
        p[chosen(p.shape[0])] = 0.0
    for _, p in _vectors(module) if _matrices(module) else ():
        p[chosen(p.numel())] = 0.0


def constant_rows(module: nn.Module, chosen: Chosen) -> None:
    """A layer's filters are zero, their bias is not."""
    for _, p in _matrices(module):
        p[chosen(p.shape[0])] = 0.0


def columns(module: nn.Module, chosen: Chosen) -> None:
    """Nobody reads a channel: its weights are zero in the layer behind it."""
    for _, p in _matrices(module):
        p[:, chosen(p.shape[1])] = 0.0


def last_dims(module: nn.Module, chosen: Chosen) -> None:
    """The last dim of whatever is no plain layer: position parameters, tokens, stacked weights."""
    for _, p in _matrices(module):
        if p.dim() > 2 and not isinstance(module, nn.modules.conv._ConvNd):
            p[..., chosen(p.shape[-1])] = 0.0


def silent(module: nn.Module, chosen: Chosen) -> None:
    """A shift far below zero: a ReLU that follows never opens, though no weight proves it."""
    for name, p in _vectors(module):
        if name in ("bias", "beta"):
            p[chosen(p.numel())] = -40.0


KILLS = {
    "zero": zero_scales,
    "constant": constant_scales,
    "rows": zero_rows,
    "bias": constant_rows,
    "columns": columns,
    "last": last_dims,
    "silent": silent,
}


@torch.no_grad()
def kill(
    model: nn.Module, ways: tuple[str, ...], fraction: float, aligned: bool, seed: int
) -> None:
    """Kill a random `fraction` of the channels of random layers, in the given `ways`.

    `aligned`: layers of one width lose the same channels, so that residual streams get narrower.
    """
    rng = torch.Generator().manual_seed(seed)
    unsettle(model, rng)
    masks: dict[int, Tensor] = {}

    def chosen(width: int) -> Tensor:
        if not aligned:
            return torch.rand(width, generator=rng) < fraction
        if width not in masks:
            masks[width] = torch.rand(width, generator=rng) < fraction
        return masks[width]

    for module in model.modules():
        for way in ways:
            if aligned or float(torch.rand((), generator=rng)) < 0.6:
                KILLS[way](module, chosen)
