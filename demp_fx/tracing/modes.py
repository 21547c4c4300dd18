"""Modes that stay what they are: a model may override `train()` to keep norms in eval mode, or set
the mode of a layer in its forward. A graph cannot; it calls such layers as functions."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from demp_fx.tracing.preserve import preserved

BY_MODE = (_NormBase, _DropoutNd, nn.RReLU)  # layers that do another thing in each mode


def kept_modes(model: nn.Module) -> dict[nn.Module, bool]:
    """The modes of the modules that the model's own `train()` and `eval()` leave as they are."""
    modules = list(model.modules())
    if all(type(m).train is nn.Module.train and "train" not in vars(m) for m in modules):
        return {}
    trained = [(p, p.requires_grad) for p in model.parameters()]  # these are often frozen with it
    found: list[dict[nn.Module, bool]] = []
    with preserved(modules), suppress(NotImplementedError):  # what torch.export has made refuses
        for mode in (False, True):
            model.train(mode)
            found.append({m: m.training for m in modules})
    for parameter, needs_grad in trained:
        if parameter.requires_grad != needs_grad:
            parameter.requires_grad_(needs_grad)
    return {m: mode for m, mode in found[0].items() if found[1][m] == mode} if found else {}


def is_kept(module: nn.Module) -> bool:
    """Whether a layer, while it is traced, is in a mode that no `train()` of the graph may change:
    no flag stands for it."""
    mode: Any = module.training
    return isinstance(module, BY_MODE) and isinstance(mode, bool)
