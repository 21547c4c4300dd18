"""Batch norms that somebody's own layer is derived of: in a graph they are layers of torch's class.

timm's layers, for one, are a batch norm, dropout and an activation under one name. The graph calls
the batch norm under that name, and then what is in it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

PLAIN = "plain"  # in a node's meta: the class of torch's that the module is called as

_KINDS: tuple[type[_BatchNorm], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_SETTINGS = {"eps", "momentum", "affine", "track_running_stats", "num_features"}


def plain_kind(module: _BatchNorm) -> type[_BatchNorm] | None:
    """The class of torch's whose forward this module's state is made for; None where that reads
    something else, such as a weight that is computed."""
    kind = next((k for k in _KINDS if isinstance(module, k)), None)
    state = {**module._parameters, **module._buffers}
    if (
        kind is None
        or type(module)._check_input_dim is not kind._check_input_dim
        or module._forward_hooks
        or module._forward_pre_hooks
        or not (state.keys() >= _STATE and vars(module).keys() >= _SETTINGS)
        or any(hasattr(type(module), name) for name in _STATE | _SETTINGS)
        or not all(state[name] is None or isinstance(state[name], Tensor) for name in _STATE)
    ):
        return None
    return kind


def as_plain(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A layer of this class with the state of `module`, and without the modules in it."""
    layer = kind.__new__(kind)
    layer.__dict__.update(vars(nn.Module()), training=module.training)
    layer.__dict__.update({name: vars(module)[name] for name in _SETTINGS})
    layer._parameters, layer._buffers = dict(module._parameters), dict(module._buffers)
    return layer


def without_parts(layer: nn.Module) -> nn.Module:
    """A layer without the modules in it that are called by themselves; itself, if it has none."""
    return as_plain(layer, type(layer)) if type(layer) in _KINDS and layer._modules else layer
