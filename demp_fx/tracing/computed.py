"""Layers whose weight is computed of other parameters before each call: parametrized ones, and
those with the hooks that torch's weight and spectral normalisation and pruning leave behind."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)


def computes_weight(module: nn.Module) -> bool:
    """Whether that is all there is to a layer: its forward can then be looked into."""
    if not str(type(module).__module__).startswith("torch.nn"):
        return False
    hooks = module._forward_pre_hooks.values()
    if module._forward_hooks or not all(isinstance(hook, _HOOKS) for hook in hooks):
        return False
    return bool(hooks) or ("parametrizations" in module._modules and is_parametrized(module))


@contextmanager
def in_both_modes(module: nn.Module) -> Iterator[None]:
    """Let hooks that branch on the mode compute what they do in both."""
    hooks = module._forward_pre_hooks
    branching = {key: hook for key, hook in hooks.items() if isinstance(hook, SpectralNorm)}
    hooks.update({key: functools.partial(_spectral, hook) for key, hook in branching.items()})
    try:
        yield
    finally:
        hooks.update(branching)


def _spectral(hook: SpectralNorm, module: Any, inputs: Any) -> None:
    """Divide the weight by its largest singular value. The vectors that tell it are brought closer
    by power iteration in train mode, and stay what they are in eval mode."""
    weight, u, v = (getattr(module, hook.name + end) for end in ("_orig", "_u", "_v"))
    matrix, moves = hook.reshape_weight_to_matrix(weight), module.training * 1.0
    with torch.no_grad():
        for _ in range(hook.n_power_iterations):
            for vector, other, rows in ((v, u, matrix.t()), (u, v, matrix)):
                closer = F.normalize(torch.mv(rows, other), dim=0, eps=hook.eps)
                vector.copy_(torch.lerp(vector, closer, moves))
    sigma = torch.dot(u.clone(), torch.mv(matrix, v.clone()))  # a second call moves them on
    setattr(module, hook.name, weight / sigma)
