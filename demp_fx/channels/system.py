"""The constraint system that a walk over the network leaves behind: it only records, and
`solve.py` decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from demp_fx.channels.constraints import (
    Axis,
    Blocks,
    Edge,
    Grouping,
    Link,
    Multiple,
    Pin,
    Product,
    Read,
    Same,
    Site,
    Traffic,
    Work,
    is_run,
)

Mark = tuple[int, ...]


@dataclass
class System:
    """Everything a walk recorded, in order of execution.

    `whole` and `ties`: what is in `sames`, as pairs of (the first atoms of) whole axes, and pairs
    of single atoms; `root`: the classes that they make, once somebody has asked for them. `stores`:
    the storages of each parameter and buffer; `uses`: the ops that compute with what is in one.
    """

    axes: list[Axis] = field(default_factory=list)
    sames: list[Same] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    flow: list[Read | Edge] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    blocks: list[Blocks] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    multiples: list[Multiple] = field(default_factory=list)
    groupings: list[Grouping] = field(default_factory=list)
    whole: set[tuple[int, int]] = field(default_factory=set)
    ties: tuple[Tensor, Tensor] = (torch.zeros(0, dtype=torch.int64),) * 2
    root: Tensor | None = None
    stores: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uses: dict[int, set[Site]] = field(default_factory=dict)
    atoms: int = 1
    macs: int = 0
    _fixed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    _seen: int = 0  # of how many pins `_fixed` tells

    @property
    def reads(self) -> list[Read]:
        return [step for step in self.flow if isinstance(step, Read)]

    @property
    def edges(self) -> list[Edge]:
        return [step for step in self.flow if isinstance(step, Edge)]

    def fresh(self, owner: str, dim: int, size: int) -> Axis:
        """New atoms for one axis."""
        axis = Axis(owner, dim, self.atoms, size)
        self.atoms += size
        self.axes.append(axis)
        return axis

    def same(self, a: Tensor, b: Tensor, site: Site) -> None:
        """Tie two label tensors of one shape; where one has no atom, the other one is pinned."""
        if a is not b:
            self.sames.append(Same(a.reshape(-1), b.reshape(-1), site))

    def is_fixed(self, atoms: Tensor) -> bool:
        """Whether each of these atoms has been pinned, so far."""
        if self._fixed.numel() < self.atoms:
            self._fixed, self._seen = torch.zeros(2 * self.atoms, dtype=torch.bool), 0
        for pin in self.pins[self._seen :]:
            if not pin.outputs:
                self._fixed[pin.atoms] = True
        self._seen = len(self.pins)
        return bool(self._fixed[atoms].all())

    def store(self, name: str, *storages: int) -> None:
        """Watch for uses of what is in the storages of a parameter or buffer."""
        self.stores[name] = storages
        for storage in storages:
            self.uses.setdefault(storage, set())

    def uses_of(self, name: str) -> set[Site]:
        """The ops that compute with a parameter or buffer, or with a part of it."""
        return set().union(*(self.uses[storage] for storage in self.stores[name]))

    def multiply(self, macs: int, *sides: Tensor) -> None:
        """Count multiplications, with the labels of the axes that they shrink with."""
        self.macs += macs
        self.work.append(Work(macs, tuple(side.reshape(-1) for side in sides)))

    def link(self, rows: Tensor, gate: Tensor, site: Site) -> None:
        """Tie the survival of rows (H, D) to that of the atoms in `gate` (H)."""
        self.links.append(Link(rows, gate, site))

    @property
    def _lists(self) -> tuple[list[Any], ...]:
        return (self.sames, self.pins, self.flow, self.traffic, self.blocks, self.links,
                self.products, self.multiples, self.groupings, self.work)  # fmt: skip

    def mark(self) -> Mark:
        """How much has been recorded so far."""
        return (*map(len, self._lists), self.macs)

    def since(self, mark: Mark) -> list[Read | Edge]:
        """The reads and edges recorded after a mark."""
        return self.flow[mark[2] :]

    def forget(self, mark: Mark) -> None:
        """Drop what was recorded after a mark; atoms that were given out stay."""
        *lengths, self.macs = mark
        for recorded, length in zip(self._lists, lengths, strict=True):
            del recorded[length:]
        self._fixed = self._fixed[:0]

    def close(self) -> None:
        """Join all that was tied; where one side has no atom, pin the other one instead."""
        sizes, single = {axis.start: axis.size for axis in self.axes}, []
        for same in self.sames:
            first = [int(t.storage_offset()) for t in (same.a, same.b) if is_run(t)]
            if len(first) == 2 and {sizes.get(k) for k in first} == {same.a.numel()}:
                self.whole.add((min(first), max(first)))
            else:
                single.append(same)
        if not single:
            return
        a = torch.cat([s.a for s in single])
        b = torch.cat([s.b for s in single])
        bare = ((a == 0) != (b == 0)).nonzero().reshape(-1)
        if bare.numel():
            ends = torch.tensor([s.a.numel() for s in single]).cumsum(0)
            which = torch.searchsorted(ends, bare, right=True)
            for k in which.unique().tolist():
                atoms = torch.maximum(a, b)[bare[which == k]]
                self.pin(atoms, "meets channels that no parameter makes", single[k].site)
        tied = (a != 0) & (b != 0) & (a != b)
        self.ties = a[tied], b[tied]

    def pin(
        self, atoms: Tensor, reason: str, site: Site, outputs: tuple[Tensor, ...] = (),
        zero: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Keep `atoms`, but for those that are `zero` (while each of `outputs` has a survivor), and
        say why."""
        outputs = tuple(o.reshape(-1) for o in outputs)
        if zero is not None:
            self.pins.append(Pin(atoms[~zero], reason, site, outputs, atoms[zero]))
        elif atoms.numel():
            self.pins.append(Pin(atoms.reshape(-1), reason, site, outputs))
