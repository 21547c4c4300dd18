"""A whole network as a spec: its input, its blocks, its head, and what is dead in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz import attention, convolutions, gates, opaque, pieces, places, products, tokens
from tests.fuzz.block import Block, Place, Spec, is_fixed, read
from tests.fuzz.kill import kill
from tests.fuzz.layers import CONVS

FAMILIES = (attention, convolutions, gates, opaque, pieces, places, products, tokens)
WORDS = 11
HEADS = ("mean", "flat", "places", "dict", "tuple", "tied")


@dataclass(frozen=True)
class Net:
    """A network and its dead channels.

    `space`: the sizes of an image (one to three), or none for text. `kills` and `fraction`: how
    channels die and how many; `aligned`: the same ones in layers of one width. `cuts`: how it
    is compiled; `observed`: with calibration data.
    """

    blocks: tuple[Spec, ...]
    space: tuple[int, ...] = (5, 4)
    stem: int = 4
    head: str = "mean"
    kills: tuple[str, ...] = ("zero",)
    fraction: float = 0.5
    aligned: bool = False
    cuts: str = "pays"
    observed: bool = False
    seed: int = 0

    @classmethod
    def read(cls, text: str) -> Net:
        """A net from its printed form."""
        found = read(text, {"Net": cls})
        if not isinstance(found, cls):
            raise ValueError("this is no Net(...)")
        return found

    def build(self) -> nn.Module:
        """The network in float64 and eval mode, with its dead channels."""
        torch.manual_seed(self.seed)
        model = Network(self).to(torch.float64).eval()
        kill(model, self.kills, self.fraction, self.aligned, self.seed)
        return model

    def inputs(self, batch: int, larger: int = 0, seed: int = 1) -> Tensor:
        """Random inputs: images, or words where there is no `space`."""
        rng = torch.Generator().manual_seed(seed)
        if not self.space:
            return torch.randint(WORDS, (batch, 6 + larger), generator=rng)
        size = [n + larger for n in self.space]
        return torch.randn(batch, 3, *size, generator=rng, dtype=torch.float64)


class Network(nn.Module):
    """Stem, blocks, and one of several heads."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.head = net.head
        if net.space:
            conv = CONVS[len(net.space) - 1]
            self.stem: nn.Module = nn.Sequential(conv(3, net.stem, 3, padding=1), nn.ReLU())
            at = Place(net.stem, net.space)
        else:
            self.stem = nn.Embedding(WORDS, net.stem)
            at = Place(net.stem, (6,), True)
        blocks: list[Block] = []
        for spec in net.blocks:
            blocks.append(spec.build(at))
            at = blocks[-1].out
        self.blocks = nn.Sequential(*blocks)
        self.at = at
        width = at.width
        for n in at.space if net.head == "flat" else ():
            width *= n
        self.neck = nn.Linear(width, net.stem if net.head == "tied" else 5)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 3)

    @property
    def fixed(self) -> bool:
        return self.head == "flat"

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor] | tuple[Tensor, ...]:
        first = self.stem(x)
        y = self.blocks(first)
        if self.head == "flat":
            return self.last(F.relu(self.norm(self.neck(y.flatten(1)))))
        if not self.at.tokens:
            y = y.flatten(2).transpose(1, 2)
        if self.head == "places":
            return self.last(F.relu(self.neck(y)))
        if self.head == "tied" and isinstance(self.stem, nn.Embedding):
            return F.linear(self.neck(y), self.stem.weight)
        if self.head == "tied":
            return self.neck(y)
        z = self.neck(y.mean(1))
        logits = self.last(F.relu(self.norm(z)))
        if self.head == "dict":
            return {"logits": logits, "features": z, "first": first}
        return (logits, y) if self.head == "tuple" else logits


def takes_other_sizes(model: nn.Module) -> bool:
    """Whether a network can be tried at another resolution."""
    return not is_fixed(model)
