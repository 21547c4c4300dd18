"""VGG-16 for images of 64 x 64, as in the paper: 2x2 average pools, two FC-4096 with batch norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512, 512, 1024))


class VGG(nn.Module):
    """Stages of 3x3 convolutions with a pool behind each, for images of `size`."""

    def __init__(
        self, stages: tuple[tuple[int, ...], ...] = STAGES, hidden: int = 4096, size: int = 64,
        channels: int = 3, classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage in stages:
            for width in stage:
                conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
            layers.append(nn.AvgPool2d(2))
        self.features = nn.Sequential(*layers)
        inputs *= (size >> len(stages)) ** 2
        self.classifier = nn.Sequential(
            nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


example_inputs = torch.zeros(1, 3, 64, 64)


def vgg16() -> VGG:
    """The network of the paper."""
    return VGG()


def small() -> VGG:
    """For images of 32 x 32 and a CPU."""
    return VGG(((16, 16), (32, 32), (64, 64), (128, 128)), hidden=128, size=32)


def medium() -> VGG:
    """Half as wide again as `small`."""
    return VGG(((24, 24), (48, 48), (96, 96), (192, 192)), hidden=192, size=32)


def for_digits() -> VGG:
    """For the digits, 8 x 8 and grey."""
    return VGG(((32, 32), (64, 64)), hidden=64, size=8, channels=1)


class Strided(nn.Module):
    """3x3 convolutions of (width, stride), the mean over space, a head: cheap on a CPU."""

    def __init__(self, layers: tuple[tuple[int, int], ...], classes: int = 10) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        inputs = 3
        for width, stride in layers:
            conv = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            parts += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
        self.features = nn.Sequential(*parts)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


def strided() -> Strided:
    """Five layers, of which the first halves the image: for images of 32 x 32 and a CPU."""
    return Strided(((64, 2), (128, 2), (128, 1), (256, 2), (256, 1)))
