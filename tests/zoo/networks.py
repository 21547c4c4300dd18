"""The zoo: torchvision's networks by name, with the smallest inputs that they take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo.shim import torchvision


@dataclass(frozen=True)
class Network:
    """How to build a network, and at which two sizes to look at it."""

    build: Callable[[], nn.Module]
    size: int = 64
    other_size: int = 96
    heavy: bool = False  # tens of millions of parameters: seconds in float64

    def example(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        """The input that it is compiled with."""
        return torch.randn(batch, 3, self.size, self.size, dtype=dtype)

    def fresh(self, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
        """An input that nobody has seen, of another batch size and resolution."""
        return torch.randn(batch, 3, self.other_size, self.other_size, dtype=dtype)


def _torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    return functools.partial(getattr(torchvision.models, name), **options)


_NO_AUX = {"aux_logits": False, "init_weights": False}

NETWORKS = {
    "resnet18": Network(_torchvision("resnet18")),
    "resnet50": Network(_torchvision("resnet50")),
    "wide_resnet50_2": Network(_torchvision("wide_resnet50_2"), heavy=True),
    "vgg16_bn": Network(_torchvision("vgg16_bn"), heavy=True),
    "alexnet": Network(_torchvision("alexnet"), heavy=True),
    "densenet121": Network(_torchvision("densenet121")),
    "mobilenet_v2": Network(_torchvision("mobilenet_v2")),
    "mobilenet_v3_large": Network(_torchvision("mobilenet_v3_large")),
    "efficientnet_b0": Network(_torchvision("efficientnet_b0")),
    "mnasnet1_0": Network(_torchvision("mnasnet1_0")),
    "squeezenet1_1": Network(_torchvision("squeezenet1_1")),
    "googlenet": Network(_torchvision("googlenet", **_NO_AUX)),
    "inception_v3": Network(_torchvision("inception_v3", **_NO_AUX), size=75, other_size=107),
}
"""Networks by name."""

WITH_AUXILIARY_HEADS = {
    "googlenet": Network(_torchvision("googlenet", init_weights=False)),
    "inception_v3": Network(_torchvision("inception_v3", init_weights=False), 75, 107),
}
"""As torchvision builds them by default; their heads run in train mode only."""


def build(network: Network, seed: int = 0) -> nn.Module:
    """The network in float64, the same one for the same seed."""
    torch.manual_seed(seed)
    return network.build().double()
