"""Twins of a traced module without numbers: to plan on, and to build on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from demp_fx.tracing.module import TracedModule


def without_numbers(graph: fx.GraphModule, device: str | torch.device = "meta") -> TracedModule:
    """A copy whose parameters hold no numbers: on meta, or one zero stretched to their shapes.

    Nothing can be proven from its weights: what is merely zero now may be trained. Buffers keep
    their numbers, indices and masks among them.
    """
    memo: dict[int, Any] = {id(p): _hollow(p, torch.device(device)) for p in graph.parameters()}
    twin = copy.deepcopy(graph, memo)
    assert isinstance(twin, TracedModule)
    return twin


def _hollow(parameter: Tensor, device: torch.device) -> nn.Parameter:
    zero = torch.zeros((), dtype=parameter.dtype, device=device)
    hollow = zero.expand(parameter.shape) if device.type != "meta" else torch.empty_like(
        parameter, device=device
    )  # fmt: skip
    return nn.Parameter(hollow, requires_grad=parameter.requires_grad)
