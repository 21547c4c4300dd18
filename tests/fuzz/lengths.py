"""Sequences of any length: what code does to tokens, by their number or by a number of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH, HEADS, LONGEST = 12, 3, 96


class Piece(nn.Module):
    """What a step has to work with: layers with dead channels, and tables that are long enough."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step
        self.make, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.pair, self.parts = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.stride, self.first = nn.Conv1d(WIDTH, WIDTH, 2, 2), nn.Parameter(torch.randn(2, WIDTH))
        self.places, self.late = nn.Parameter(torch.randn(LONGEST, WIDTH)), torch.randn(LONGEST)
        self.mix, self.shift = nn.Parameter(torch.randn(LONGEST, LONGEST)), torch.randn(LONGEST)
        self.late[:9] = 0  # as far as the example goes
        self.late, self.shift = nn.Parameter(self.late), nn.Parameter(self.shift)
        self.register_buffer("mask", torch.ones(LONGEST, LONGEST).tril())
        with torch.no_grad():
            for layer in (self.make, self.pair, self.parts):
                dead = torch.randperm(layer.out_features)[: layer.out_features // 2]
                layer.weight[dead] = layer.bias[dead] = 0

    def forward(self, x: Tensor) -> Tensor:
        return STEPS[self.step](self, x)


def attention(p: Piece, x: Tensor) -> Tensor:
    n = x.shape[1]
    heads = p.make(x).view(x.shape[0], n, HEADS, -1).transpose(1, 2)
    scores = (heads @ heads.mT).masked_fill(p.mask[:n, :n] == 0, -1e9).softmax(-1)
    return x + p.read((scores @ heads).transpose(1, 2).reshape(x.shape))


def heads_in_the_batch(p: Piece, x: Tensor) -> Tensor:
    heads = p.make(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2).reshape(-1, x.shape[1], 4)
    mixed = (heads @ heads.mT).softmax(-1) @ heads
    return x + p.read(mixed.view(-1, HEADS, x.shape[1], 4).transpose(1, 2).flatten(2))


def mixed_by_a_layer(p: Piece, x: Tensor) -> Tensor:
    n = x.shape[1]
    return x + F.linear(p.make(x).mT, p.mix[:n, :n], p.shift[:n]).mT


def even(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2 * 2]


STEPS: dict[str, Callable[[Piece, Tensor], Tensor]] = {
    "mlp": lambda p, x: x + p.read(p.make(x).relu()),
    "attention": attention,
    "heads in the batch": heads_in_the_batch,
    "mixed": lambda p, x: x + p.mix[: x.shape[1], : x.shape[1]] @ p.make(x),
    "mixed by a layer": mixed_by_a_layer,
    "places": lambda p, x: x + p.places[: x.shape[1]],
    "last places": lambda p, x: x * p.places[-x.size(1) :],
    "one place": lambda p, x: x + p.places[x.shape[1] - 1],
    "late": lambda p, x: x * p.late[: x.shape[1], None],
    "shift": lambda p, x: x + p.shift[: x.shape[1], None],
    "more in front": lambda p, x: torch.cat([p.first.expand(x.shape[0], -1, -1), x], 1),
    "more behind": lambda p, x: torch.cat([x, p.make(x)], 1),
    "pairs": lambda p, x: p.pair(even(x).reshape(x.shape[0], -1, 2 * WIDTH)),
    "apart": lambda p, x: p.parts(x).reshape(x.shape[0], -1, WIDTH),
    "stride": lambda p, x: p.stride(x.mT).mT,
    "first half": lambda p, x: x[:, : x.shape[1] // 2],
    "second half": lambda p, x: x[:, x.shape[1] // 2 :],
    "halves": lambda p, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "one and others": lambda p, x: torch.cat(x.split([1, x.shape[1] - 1], 1)[::-1], 1),
    "without the first": lambda p, x: x.flatten(1)[:, WIDTH:].reshape(x.shape[0], -1, WIDTH),
    "without the last": lambda p, x: x.flatten(1)[:, :-WIDTH].view(x.shape[0], -1, WIDTH),
    "shifted": lambda p, x: torch.cat([F.pad(x[:, :-1], (0, 0, 1, 0))[..., :6], x[..., 6:]], -1),
    "turned": lambda p, x: x.flip(1),
    "rolled": lambda p, x: x.roll(1, 1),
    "last added": lambda p, x: x + x[:, -1:],
}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x,
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "mean": lambda x: x.mean(1),
}


class Sequence(nn.Module):
    """Some steps, and what is read in the end."""

    def __init__(self, steps: list[str], read: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.pieces, self.result = nn.Sequential(*map(Piece, steps)), read
        with torch.no_grad():
            self.stem.weight[::3] = self.stem.bias[::3] = 0
        self.double().eval()

    def left(self, tokens: int) -> bool:
        """Whether any of so many tokens are left in the end."""
        try:
            return self.pieces(torch.zeros(1, tokens, WIDTH).double()).shape[1] > 0
        except RuntimeError:  # fewer than a layer takes
            return False

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(READS[self.result](self.pieces(self.stem(x))))
        return result


steps = st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4)
reads = st.sampled_from(sorted(READS))
