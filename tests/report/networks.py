"""Small networks whose groups can be counted by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import demp_fx


class Residual(nn.Module):
    """Two convolutions around which the input passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.norm(self.conv(x))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Its two convolutions are read as one concat."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 5, 1)
        self.head = nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(x)], 1))


def chain() -> nn.Sequential:
    """conv 3 -> 8, norm, relu, conv 8 -> 5; of the eight channels three are zero, two constant."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    with torch.no_grad():
        model.get_parameter("1.weight")[:5] = 0
        model.get_parameter("1.bias")[:3] = 0
        model.get_parameter("1.bias")[3:5] = 1
    return model.eval()


def analyzed(model: nn.Module, *shape: int) -> demp_fx.DependencyGraph:
    return demp_fx.analyze(demp_fx.trace(model, torch.randn(*shape)))
