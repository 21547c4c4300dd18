"""Attributes of torch.nn layers that name a size, and where the weights tell the new value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Rule = Callable[[Any], dict[str, Any]]


def _conv(m: Any) -> dict[str, Any]:
    # in a depthwise convolution each filter, or each few of them, is a group of its own
    depthwise = m.groups > 1 and m.groups == m.in_channels and m.weight.shape[1] == 1
    groups = m.weight.shape[0] // (m.out_channels // m.groups) if depthwise else m.groups
    return {"out_channels": m.weight.shape[0], "in_channels": m.weight.shape[1] * groups,
            "groups": groups}  # fmt: skip


def _transposed(m: Any) -> dict[str, Any]:
    return {"in_channels": m.weight.shape[0], "out_channels": m.weight.shape[1] * m.groups}


def _linear(m: Any) -> dict[str, Any]:
    return {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}


def _batch_norm(m: Any) -> dict[str, Any]:
    known = m.weight if m.weight is not None else m.running_mean
    return {} if known is None else {"num_features": known.shape[0]}


def _group_norm(m: Any) -> dict[str, Any]:
    if m.weight is None:
        return {}
    size = m.weight.shape[0]
    return {"num_channels": size, "num_groups": size // (m.num_channels // m.num_groups)}


def _layer_norm(m: Any) -> dict[str, Any]:
    return {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)}


def _recurrent(m: Any) -> dict[str, Any]:
    projected, hidden = m.weight_hr_l0.shape if m.proj_size else (0, m.weight_hh_l0.shape[1])
    return {"input_size": m.weight_ih_l0.shape[1], "proj_size": projected, "hidden_size": hidden}


ROWS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Rule], ...] = (
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    (nn.Linear, _linear),
    ((nn.modules.batchnorm._NormBase,), _batch_norm),
    (nn.Embedding, lambda m: {"num_embeddings": m.weight.shape[0],
                              "embedding_dim": m.weight.shape[1]}),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, lambda m: {"input_size": m.weight_ih.shape[1],
                                "hidden_size": m.weight_hh.shape[1]}),
    (nn.PReLU, lambda m: {"num_parameters": m.weight.shape[0]}),
)  # fmt: skip


def _grouped(m: Any, groups: int) -> dict[str, Any]:
    own, others = m.weight.shape[0], m.weight.shape[1] * groups
    if isinstance(m, nn.modules.conv._ConvTransposeNd):
        return {"groups": groups, "in_channels": own, "out_channels": others}
    return {"groups": groups, "in_channels": others, "out_channels": own}


def _tensors(module: nn.Module) -> list[Any]:
    return [*module._parameters.values(), *module._buffers.values()]


def _bare_norm(m: Any, channels: int) -> dict[str, Any]:
    """A norm without parameters: what goes into it tells its size."""
    if isinstance(m, nn.GroupNorm):
        groups = channels // (m.num_channels // m.num_groups)
        return {"num_channels": channels, "num_groups": groups}
    return {"num_features": channels}


def sizes(module: nn.Module, groups: int | None, channels: int | None) -> Iterator[tuple[str, Any]]:
    """The attributes of a layer that follow from the shapes of its parameters.

    `groups`: how many are left of a grouped convolution's, where those have become narrower.
    `channels`: how many are left on dim 1 of what comes out of the layer, if fewer.
    """
    norm = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
    if norm and channels is not None and not any(t is not None for t in _tensors(module)):
        yield from _bare_norm(module, channels).items()
        return
    if groups is not None and isinstance(module, nn.modules.conv._ConvNd):
        yield from _grouped(module, groups).items()
        return
    for kinds, rule in ROWS:
        if isinstance(module, kinds):
            yield from rule(module).items()
            return
