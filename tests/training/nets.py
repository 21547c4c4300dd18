"""Small networks to train, and ways to kill neurons in them for good."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


class Plain(nn.Module):
    """conv - norm - relu, twice, and a head; in float64."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Block(nn.Module):
    """A residual block with its activation behind the sum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


class Residual(nn.Module):
    """A stem, two residual blocks, a hidden layer without a norm, and a head; in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block1, self.block2 = Block(8, 8), Block(8, 12)
        self.hidden = nn.Linear(12 * 4, 10)
        self.head = nn.Linear(10, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.adaptive_avg_pool2d(self.block2(self.block1(x)), 2).flatten(1)
        logits: Tensor = self.head(F.relu(self.hidden(x)))
        return logits


def kill(norm: nn.BatchNorm2d, channels: Sequence[int]) -> None:
    """Channels whose ReLU never fires: a small scale under a large negative shift."""
    with torch.no_grad():
        norm.weight[channels] = 0.1
        norm.bias[channels] = -5.0


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Images and labels that depend on the number of the step alone."""
    rng = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, 3, 6, 6, generator=rng, dtype=torch.float64)
    return x, torch.randint(CLASSES, (size,), generator=rng)


def probes(count: int = 2) -> list[Tensor]:
    """Probe batches."""
    return [batch(1000 + k, 16)[0] for k in range(count)]
