"""A model and data for runs of a second: three classes of small noisy pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CLASSES, SIZE = 3, 6


class Tiny(nn.Module):
    """conv - norm - relu - conv - norm - relu - mean - dropout - linear."""

    def __init__(self, width: int = 12, channels: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(width, CLASSES)
        with torch.no_grad():
            # these die in time: a small scale, and a shift on its way down
            self.bn1.bias[:4], self.bn1.weight[:4] = -2.5, 0.7
            self.bn2.bias[:3], self.bn2.weight[:3] = -3.0, 0.6

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.head(self.drop(x.mean((2, 3))))
        return logits


def model() -> nn.Module:
    return Tiny()


def grey() -> nn.Module:
    return Tiny(channels=1)


def data() -> tuple[TensorDataset, TensorDataset]:
    """120 pictures to train and 30 to test on."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(150) % CLASSES
    images = torch.randn(150, 2, SIZE, SIZE, generator=rng)
    images[torch.arange(150), 0, labels] += 2.0  # a class is a brighter row
    return (TensorDataset(images[:120], labels[:120]), TensorDataset(images[120:], labels[120:]))


RECIPE = {
    "model": "tests.training.tiny:model",
    "data": {"kind": "factory", "factory": "tests.training.tiny:data"},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "schedule": {"name": "cosine"},
    "batch": 20,
    "epochs": 6,
    "probe": {"batches": 2, "size": 40},
    "log_every": 2,
    "checkpoint_every": 4,
    "device": "cpu",
    "threads": 1,
    "demon": {"penalty": 0.3, "noise_std": 1e-3, "span": "80%", "prune_every": 5},
}
