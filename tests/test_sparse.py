"""Graph networks: the adjacency is a sparse matrix, given or kept in a buffer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import demp_fx


class Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.spmm(adjacency, x @ self.weight) + self.bias


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Convolution(6, 8), Convolution(8, 3)
        with torch.no_grad():
            self.a.weight[:, ::2] = 0

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        result: Tensor = self.b(self.a(x, adjacency).relu(), adjacency)
        return result


class OfOneGraph(GraphNetwork):
    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.adjacency)


def test_a_sparse_adjacency_lets_channels_through() -> None:
    torch.manual_seed(0)
    adjacency = (torch.rand(5, 5) > 0.5).float().to_sparse()
    x = torch.randn(5, 6)
    for net, inputs in ((GraphNetwork(), (x, adjacency)), (OfOneGraph(adjacency), (x,))):
        narrow = demp_fx.compile(net, inputs).module
        assert narrow.get_submodule("a").get_parameter("weight").shape == (6, 4)
        torch.testing.assert_close(narrow(*inputs), net(*inputs))
