"""Which op ties which axes together: the chains behind a pruning group."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from demp_fx.channels.constraints import Axis, Site
from demp_fx.channels.groups import Tie
from demp_fx.channels.system import System


def axes_of(system: System, atoms: Tensor) -> Tensor:
    """The place of each atom's axis in `system.axes` (-1 for atom 0)."""
    starts = torch.tensor([axis.start for axis in system.axes], dtype=torch.int64)
    return torch.searchsorted(starts, atoms, right=True) - 1


class Ties:
    """The axes of a system as a graph, with an edge where an op unifies channels of two."""

    def __init__(self, system: System) -> None:
        self.axes = system.axes
        self.around: dict[int, dict[int, Site]] = defaultdict(dict)
        sames = [s for s in system.sames if s.a.numel()]
        if not sames:
            return
        a, b = (axes_of(system, torch.cat(side))
                for side in ([s.a for s in sames], [s.b for s in sames]))  # fmt: skip
        op = torch.arange(len(sames)).repeat_interleave(torch.tensor([s.a.numel() for s in sames]))
        tied = (a >= 0) & (b >= 0) & (a != b)
        size = len(system.axes)
        keys = ((op * size + a) * size + b)[tied].unique()  # in order of execution
        for key in keys.tolist():
            x, y, site = key // size % size, key % size, sames[key // size // size].site
            self.around[x].setdefault(y, site)
            self.around[y].setdefault(x, site)

    def tree(self, start: int) -> Iterator[tuple[int, int, Site]]:
        """Every axis tied to `start`, the nearest first: where from, which, and by which op."""
        waiting, seen = deque([start]), {start}
        while waiting:
            here = waiting.popleft()
            for axis, site in self.around[here].items():
                if axis not in seen:
                    seen.add(axis)
                    waiting.append(axis)
                    yield here, axis, site

    def described(self, start: int, known: Callable[[Axis], bool]) -> list[Tie]:
        """`tree` in words, without what leads to no axis that is `known`."""
        steps = list(self.tree(start))
        wanted = {axis for _, axis, _ in steps if known(self.axes[axis])}
        for source, axis, _ in reversed(steps):
            if axis in wanted:
                wanted.add(source)
        return [
            Tie(name_of(self.axes[x]), name_of(self.axes[y]), site.op, site.node, site.source)
            for x, y, site in steps
            if y in wanted
        ]


def name_of(axis: Axis) -> str:
    """'name[dim]' of a parameter; 'producer->consumer' of a value on its way."""
    return axis.owner if axis.dim < 0 else str(axis)
