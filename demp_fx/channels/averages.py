"""Nodes that average over channels, and can be told how many there were.

Zeros that leave such a node leave its sums as they are, but not what these are divided by: the
rewrite puts the old number there (`passes/count.py` has one row for each of these targets).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from demp_fx.calls import called

MEANS: set[Any] = {"mean", torch.mean, torch.ops.aten.mean.dim}
LAYER_NORMS: set[Any] = {F.layer_norm, torch.ops.aten.layer_norm.default, nn.LayerNorm}
RMS_NORMS: set[Any] = {F.rms_norm, torch.ops.aten.rms_norm.default, nn.RMSNorm}


AVERAGES = MEANS | LAYER_NORMS | RMS_NORMS


def kind_of(node: fx.Node, layers: Mapping[str, nn.Module]) -> Any:
    """What a node calls; of a module, its class. `layers`: the modules by name."""
    return type(layers[str(node.target)]) if node.op == "call_module" else called(node)


def takes_average(node: fx.Node, layers: Mapping[str, nn.Module]) -> bool:
    """Whether a node is one of those above."""
    return kind_of(node, layers) in AVERAGES
