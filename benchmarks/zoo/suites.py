"""The collections of networks, and which of them are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch

from benchmarks.zoo import networks, others
from benchmarks.zoo.networks import Network


@dataclass(frozen=True)
class Suite:
    """Names, and the network of a name; only those that are asked for are looked into.

    `package`: where the networks are from, if the tests do without it; such a suite is only run
    when it is named.
    """

    names: Callable[[], list[str]]
    network: Callable[[str], Network]
    package: str = ""


SUITES = {
    "torchvision": Suite(networks.torchvision_names, networks.torchvision_network),
    "timm": Suite(lambda: networks.TIMM, networks.timm_network),
    "transformers": Suite(networks.transformer_names, networks.transformer_network),
    "pytorchcv": Suite(lambda: others.PYTORCHCV, others.pytorchcv_network, "pytorchcv"),
    "segmentation-models": Suite(
        others.segmentation_names, others.segmentation_network, "segmentation-models-pytorch"
    ),
    "vit-pytorch": Suite(
        lambda: list(others.VIT_PYTORCH), others.vit_pytorch_network, "vit-pytorch"
    ),
}


def select(suites: list[str], patterns: list[str]) -> list[Network]:
    """The networks of these suites (those that the tests use, if none is named) whose names match
    any pattern."""
    return [
        SUITES[suite].network(name)
        for suite in suites or [name for name, suite in SUITES.items() if not suite.package]
        for name in SUITES[suite].names()
        if not patterns or any(fnmatch(name, pattern) for pattern in patterns)
    ]
