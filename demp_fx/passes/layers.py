"""Attributes of torch.nn layers that name a size, and where the weights tell the new value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Rule = Callable[[Any], dict[str, Any]]


def _conv(m: Any) -> dict[str, Any]:
    groups = m.groups if m.groups == 1 else m.weight.shape[0] // max(1, m.out_channels // m.groups)
    return {"out_channels": m.weight.shape[0], "in_channels": m.weight.shape[1] * groups,
            "groups": groups}  # fmt: skip


def _transposed(m: Any) -> dict[str, Any]:
    return {"in_channels": m.weight.shape[0], "out_channels": m.weight.shape[1] * m.groups}


def _linear(m: Any) -> dict[str, Any]:
    return {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}


def _batch_norm(m: Any) -> dict[str, Any]:
    known = m.weight if m.weight is not None else m.running_mean
    return {} if known is None else {"num_features": known.shape[0]}


ROWS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Rule], ...] = (
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    (nn.Linear, _linear),
    ((nn.modules.batchnorm._NormBase,), _batch_norm),
    (nn.Embedding, lambda m: {"num_embeddings": m.weight.shape[0],
                              "embedding_dim": m.weight.shape[1]}),
    (nn.PReLU, lambda m: {"num_parameters": m.weight.shape[0]}),
)  # fmt: skip


def sizes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a layer that follow from the shapes of its parameters."""
    for kinds, rule in ROWS:
        if isinstance(module, kinds):
            yield from rule(module).items()
            return
