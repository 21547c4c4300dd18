"""The dependency graph: pruning groups, what ties their members, what is pinned and by what."""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from demp_fx.channels.solve import Solution, classes, components
from demp_fx.channels.stream import STRUCTURE
from demp_fx.channels.system import Read, System


@dataclass(frozen=True)
class Member:
    """One dim of a parameter or buffer, whose channels go with those of its group."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Pin:
    """Channels of a group that have to stay: why, by which op, at which node and user line."""

    reason: str
    op: str
    node: str
    source: str | None
    channels: int


@dataclass
class Group:
    """Channels that are cut together.

    `size`: how many channels can be told apart. `removable`: how many of them can go.
    """

    id: int
    size: int
    removable: int
    members: list[Member] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)


@dataclass(frozen=True)
class Link:
    """One group feeds another, at a node: by a contraction ("read"), or where the graph may be cut
    ("sum": into a residual sum, "gather": in front of one of several readers, "spread": before
    what turns dead channels into others)."""

    source: int
    target: int
    kind: str
    node: str
    line: str | None


class DependencyGraph:
    """Pruning groups of a network and how they feed each other."""

    def __init__(self, system: System, solution: Solution, params: set[str]) -> None:
        self._system, self._solution = system, solution
        self._root = classes(system)
        self._axes = [a for a in system.axes if a.owner in params]
        self._group_of = _groups(self._root, system)
        self._number = {int(g): k for k, g in enumerate(dict.fromkeys(
            int(self._group_of[a.start]) for a in self._axes))}  # fmt: skip
        self.groups = self._build()

    def _build(self) -> list[Group]:
        groups = [Group(k, 0, 0) for k in range(len(self._number))]
        for axis in self._axes:
            group = groups[self._number[int(self._group_of[axis.start])]]
            group.members.append(Member(axis.owner, axis.dim, axis.size))
        present = torch.zeros(self._system.atoms, dtype=torch.bool)
        present[self._root[torch.cat([a.atoms for a in self._axes])] if self._axes else []] = True
        roots = present.nonzero().reshape(-1)
        owner = self._group_of[roots]
        gone = ~self._solution.kept(roots)
        sizes, removable = owner.bincount(), owner[gone].bincount(minlength=int(owner.max()) + 1)
        for g, k in self._number.items():
            groups[k].size, groups[k].removable = int(sizes[g]), int(removable[g])
        self._pin(groups)
        return groups

    def _pin(self, groups: list[Group]) -> None:
        seen: Counter[tuple[int, str, str, str, str | None]] = Counter()
        for pin in self._system.pins:
            owners = self._group_of[pin.atoms]
            for owner in owners.unique().tolist() if pin.reason != STRUCTURE else ():
                channels = int(self._root[pin.atoms[owners == owner]].unique().numel())
                for source in self._sources(owner):
                    site = pin.site
                    seen[source, pin.reason, site.op, site.node, site.source] += channels
        for (k, reason, op, node, line), channels in seen.items():
            groups[k].pins.append(Pin(reason, op, node, line, channels))

    def _sources(self, owner: int) -> list[int]:
        """The groups of parameters whose channels are in a group, or arrive in it over edges."""
        waiting, seen, found = [owner], {owner}, []
        for group in waiting:
            if group in self._number:
                found.append(self._number[group])
            new = self._feeds.get(group, set()) - seen
            seen |= new
            waiting += new
        return found

    @functools.cached_property
    def _feeds(self) -> dict[int, set[int]]:
        """For each group of atoms, those that arrive in it through edges."""
        feeds: dict[int, set[int]] = defaultdict(set)
        for edge in self._system.edges:
            target, source = self._group_of[edge.target[0]], self._group_of[edge.source[0]]
            feeds[int(target)].add(int(source))
        return feeds

    @functools.cached_property
    def links(self) -> list[Link]:
        """Which group feeds which."""
        links: dict[Link, None] = {}
        for step in self._system.flow:
            if isinstance(step, Read):
                pairs = [(step.inputs, o, "read") for o in step.outputs]
            else:
                pairs = [(step.source, step.target, step.kind)]
            for source, target, kind in pairs:
                for a in self._of(source):
                    for b in self._of(target):
                        links[Link(a, b, kind, step.site.node, step.site.source)] = None
        return list(links)

    def _of(self, atoms: Tensor) -> list[int]:
        found = self._group_of[atoms].unique().tolist()
        return [self._number[g] for g in found if g in self._number]

    def to_dict(self) -> dict[str, Any]:
        """Groups and links as plain data."""
        return {
            "groups": [asdict(g) for g in self.groups],
            "links": [asdict(link) for link in self.links],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def to_networkx(self) -> nx.MultiDiGraph[int]:
        """A node for each group (size, removable, members, pins), an edge for each link (kind,
        node, line)."""
        graph: nx.MultiDiGraph[int] = nx.MultiDiGraph()
        for group in self.groups:
            data = asdict(group)
            graph.add_node(data.pop("id"), **data)
        for link in self.links:
            graph.add_edge(link.source, link.target, kind=link.kind, node=link.node, line=link.line)
        return graph

    def __repr__(self) -> str:
        free = sum(1 for g in self.groups if g.removable)
        return f"DependencyGraph({len(self.groups)} groups, {free} with dead channels)"


def _groups(root: Tensor, system: System) -> Tensor:
    """For each atom a number that all atoms of its group share: axes with a channel in common."""
    sizes = torch.tensor([1, *(axis.size for axis in system.axes)])  # atom 0 is its own axis
    owner = torch.arange(sizes.numel()).repeat_interleave(sizes)
    first = torch.full((system.atoms,), len(system.axes) + 1)
    first = first.scatter_reduce(0, root, owner, "amin")
    axis_root = components(len(system.axes) + 1, [(owner[1:], first[root][1:])])
    return axis_root[owner]
