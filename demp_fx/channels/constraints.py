"""What an op can say about channels: atoms, and what ties them.

An *atom* is one index of one axis: of a parameter's dim, or of an edge between two nodes. Atom 0
means "no atom".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from demp_fx.channels.facts import Facts

_pools = [torch.arange(1 << 16)]  # each twice as long as the one before it


def numbers(start: int, stop: int) -> Tensor:
    """The integers from `start` to `stop`, as a view of one growing tensor: a slice is cheap."""
    if stop > _pools[-1].numel():
        _pools.append(torch.arange(max(stop, 2 * _pools[-1].numel())))
    return _pools[-1][start:stop]


def is_run(atoms: Tensor) -> bool:
    """Whether a vector is a slice of `numbers`, so that its first element is its offset there."""
    if atoms.dim() != 1 or atoms.stride(0) != 1:
        return False
    storage = atoms.untyped_storage().data_ptr()
    return any(pool.data_ptr() == storage for pool in _pools)


@dataclass(frozen=True, slots=True)
class Site:
    """Where something happened: the ATen op, the fx node that ran it, the user's line."""

    op: str
    node: str
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """A run of fresh atoms: one dim of a parameter or buffer (or, with `dim` -1, of an edge)."""

    owner: str
    dim: int
    start: int
    size: int

    @property
    def atoms(self) -> Tensor:
        return numbers(self.start, self.stop)

    @property
    def stop(self) -> int:
        return self.start + self.size

    def __str__(self) -> str:
        return f"{self.owner}[{self.dim}]"


@dataclass(frozen=True, slots=True)
class Same:
    """`a[k]` and `b[k]` live and die together."""

    a: Tensor
    b: Tensor
    site: Site


@dataclass(frozen=True, slots=True)
class Pin:
    """These atoms stay: always, or while each of `outputs` has a survivor. `spared`: those that may
    go, as they are zero."""

    atoms: Tensor
    reason: str
    site: Site
    outputs: tuple[Tensor, ...] = ()
    spared: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Fold:
    """Where a read may put constants: an input axis of a weight, and the bias that follows."""

    weight: str
    dim: int
    bias: str | None
    padded: bool


@dataclass(frozen=True, slots=True)
class Read:
    """A contraction: whoever computes any of `outputs` needs every input that is not dead.

    `outputs` holds one atom tensor for each label of the result; the read happens while each has a
    survivor. `gate`, where the inputs come in blocks: for each input the atom of its block, which
    says whether that block is computed at all. `silent`: inputs whose weights are all zero. `macs`
    and `weights`: how many multiplications and parameters it has in all.
    """

    inputs: Tensor
    outputs: tuple[Tensor, ...]
    facts: Facts | None
    silent: Tensor | None
    fold: Fold | None
    macs: int
    weights: int
    site: Site
    gate: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """An axis that is split into nested blocks, `atoms` (n1, ..., nk) outer axis first.

    What is left must be such blocks again: each as long as the others of its level, whatever is in
    it.
    """

    atoms: Tensor
    site: Site


@dataclass(frozen=True, slots=True)
class Link:
    """Row h of `rows` (H, D) has survivors iff `gate[h]` survives: a head, a group."""

    rows: Tensor
    gate: Tensor
    site: Site


@dataclass(frozen=True, slots=True)
class Product:
    """Several axes that are merged into one, such as the outputs and inputs of a weight:
    `cells[k]` survives iff `side[k]` does for each of the `sides`."""

    cells: Tensor
    sides: tuple[Tensor, ...]
    site: Site


@dataclass(frozen=True, slots=True)
class Multiple:
    """An axis of which a kernel takes a multiple of `of` channels only."""

    atoms: Tensor
    of: int


@dataclass(frozen=True, slots=True)
class Grouping:
    """The weight of a grouped convolution: dim 0 in blocks `first` (G, n), of which block g has
    the channels `second[g]` (G, m) on dim 1.

    `weight`: the parameter; or the node that computes the weight, for the node `consumer`.
    """

    weight: str
    first: Tensor
    second: Tensor
    consumer: str | None = None


@dataclass(frozen=True, slots=True)
class Edge:
    """A place where the graph may be cut: the channels before (`source`) and after (`target`).

    The target may be narrower: the rest is gathered. The source may be narrower where it is zero
    or constant, if the edge leads into a residual sum ("sum": the source is added where it
    belongs) or what follows turns zeros into something else ("spread": they are put back first).
    `elements`: how many numbers one channel holds here.
    """

    producer: str
    consumer: str
    dim: int
    source: Tensor
    target: Tensor
    facts: Facts | None
    kind: str
    elements: int
    site: Site


@dataclass(frozen=True, slots=True)
class Traffic:
    """A value that some op writes: the atoms along one of its dims, and the numbers behind each."""

    atoms: Tensor
    elements: int


@dataclass(frozen=True, slots=True)
class Work:
    """Multiplications of one op, and the atoms along each axis that they shrink with."""

    macs: int
    sides: tuple[Tensor, ...]
