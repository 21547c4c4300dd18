"""Layers whose weight is computed of other parameters before each call: parametrized ones, and
those with the hooks that torch's weight normalisation and pruning leave behind."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = (BasePruningMethod, WeightNorm)


def computes_weight(module: nn.Module) -> bool:
    """Whether that is all there is to a layer: its forward can then be looked into."""
    if not str(type(module).__module__).startswith("torch.nn"):
        return False
    hooks = module._forward_pre_hooks.values()
    if module._forward_hooks or not all(isinstance(hook, _HOOKS) for hook in hooks):
        return False
    return bool(hooks) or ("parametrizations" in module._modules and is_parametrized(module))
