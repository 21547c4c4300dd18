"""The dependency graph: pruning groups, what ties their members, what is pinned and by what."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from demp_fx.channels.classes import classes, components
from demp_fx.channels.constraints import Axis, Edge, Product, Read
from demp_fx.channels.groups import Block, Group, GroupGraph, Link, Member, Node, Pin, Tie
from demp_fx.channels.runs import Indices
from demp_fx.channels.solution import Solution
from demp_fx.channels.states import macs, states
from demp_fx.channels.system import System
from demp_fx.channels.ties import Ties, axes_of, name_of
from demp_fx.channels.values import STRUCTURE
from demp_fx.turns import in_turn

if TYPE_CHECKING:
    import networkx as nx

    from demp_fx.channels.explain import Explanation

__all__ = ["Block", "DependencyGraph", "Group", "Link", "Member", "Node", "Pin", "Tie"]


class DependencyGraph:
    """Pruning groups of a network and how they feed each other.

    `groups`: first those of parameters, then those of values that no parameter is tied to, such as
    a residual stream; `bare`: the same, with members and pins alone. `axes`: those of parameters
    and buffers. `names`: by each name of a parameter or buffer, the one that it goes by here (of
    tied ones the first). `nodes`: the network around them, where `analyze` has made the graph.
    """

    def __init__(self, system: System, solution: Solution, params: set[str]) -> None:
        self.system, self.solution, self.params = system, solution, params
        self.nodes: list[Node] = []
        self.names = {name: name for name in params}
        self._root = classes(system)
        self._firsts = np.array([0, *(axis.start for axis in system.axes)])  # atom 0 is an axis
        self._owners = _owners(system, self._firsts)
        self.axes = self._channels([a for a in system.axes if a.owner in params])
        self._all = [*self.axes, *_streams(system)]
        owners = self._group_of(_starts(self._all)).tolist()
        self._number = {g: k for k, g in enumerate(dict.fromkeys(owners))}
        self.bare = self._build(owners)

    def _channels(self, axes: list[Axis]) -> list[Axis]:
        """Without the groups that are no channels, such as the sides of a kernel."""
        structure = np.zeros(self.system.atoms, dtype=np.bool_)
        for pin in self.system.pins:
            if pin.reason == STRUCTURE:
                structure[pin.atoms.numpy()] = True
        for pin in self.system.pins:
            if pin.reason != STRUCTURE:
                structure[pin.atoms.numpy()] = False
        starts = _starts(axes)
        owners, bare = self._group_of(starts).tolist(), structure[starts].tolist()
        channels = {g for g, structural in zip(owners, bare, strict=True) if not structural}
        return [a for a, g in zip(axes, owners, strict=True) if g in channels]

    def _build(self, owners: list[int]) -> list[Group]:
        """The groups; `owners`: the group of atoms that each axis is in."""
        groups = [Group(k) for k in range(len(self._number))]
        for k, (axis, owner) in enumerate(zip(self._all, owners, strict=True)):
            group = groups[self._number[owner]]
            group.name = group.name or name_of(axis)
            if k < len(self.axes):
                group.members.append(Member(axis.owner, axis.dim, axis.size))
        self._pin(groups)
        return groups

    @functools.cached_property
    @in_turn
    def groups(self) -> list[Group]:
        """The groups with their sizes, what is dead in them, and their multiplications."""
        self._count(self.bare)
        return self.bare

    def _group_of(self, atoms: Indices | int) -> Indices:
        """For each atom a number that all atoms of its group share."""
        found: Indices = self._owners[np.searchsorted(self._firsts, atoms, "right") - 1]
        return found

    def group_of(self, axis: Axis) -> Group:
        """The group that the channels of an axis are in."""
        return self.groups[self._number[int(self._group_of(axis.start))]]

    def _count(self, groups: list[Group]) -> None:
        present = torch.zeros(self.system.atoms, dtype=torch.bool)
        for axis in self._all:
            present[self._root[axis.atoms]] = True
        roots = present.nonzero().reshape(-1)
        zero, known = states(self.system, self._root)
        owner = self._numbers[roots]
        for name, mask in (
            ("size", torch.ones_like(roots, dtype=torch.bool)),
            ("removable", ~self.solution.kept(roots)),
            ("dead", zero[roots]),
            ("constant", known[roots] & ~zero[roots]),
        ):
            for group, n in zip(groups, self._tally(owner[mask]), strict=True):
                setattr(group, name, n)
        for group, work in zip(groups, macs(self.system, self._numbers, len(groups)), strict=True):
            group.macs = round(work)

    def _tally(self, numbers: Tensor) -> list[int]:
        counts: list[int] = numbers.bincount(minlength=len(self._number)).tolist()
        return counts

    @functools.cached_property
    def _numbers(self) -> Tensor:
        """For each atom the id of its group, -1 where it is in none."""
        table = torch.full((self._owners.size,), -1)
        table[list(self._number)] = torch.arange(len(self._number))
        sizes = torch.tensor([1, *(axis.size for axis in self.system.axes)])
        return table[torch.from_numpy(self._owners)].repeat_interleave(sizes)

    def groups_in(self, label: Tensor) -> dict[int, int]:
        """The ids of the groups that a label's atoms are in, and how many channels of each."""
        atoms = self._root[label.reshape(-1)].unique()
        numbers = self._numbers[atoms]
        ids, counts = numbers[numbers >= 0].unique(return_counts=True)
        return dict(zip(ids.tolist(), counts.tolist(), strict=True))

    def _pin(self, groups: list[Group]) -> None:
        seen: Counter[tuple[int, str, str, str, str | None]] = Counter()
        root, pins = self._root.numpy(), [p for p in self.system.pins if p.reason != STRUCTURE]
        for pin in pins:
            atoms = np.unique(root[pin.atoms.numpy()])
            owners, counts = np.unique(self._group_of(atoms), return_counts=True)
            site = pin.site
            for owner, channels in zip(owners.tolist(), counts.tolist(), strict=True):
                for source in self._sources(owner):
                    seen[source, pin.reason, site.op, site.node, site.source] += channels
        for (k, reason, op, node, line), channels in seen.items():
            groups[k].pins.append(Pin(reason, op, node, line, channels))

    def _sources(self, owner: int) -> list[int]:
        """The groups whose channels are in a group, or arrive in it over edges."""
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
        for edge in self.system.edges:
            source, target = (self._group_of(int(side[0])) for side in (edge.source, edge.target))
            feeds[int(target)].add(int(source))
        return feeds

    @functools.cached_property
    @in_turn
    def links(self) -> list[Link]:
        """Which group feeds which."""
        links: dict[Link, None] = {}
        for step in [*self.system.flow, *self.system.links, *self.system.products]:
            if isinstance(step, Read):
                pairs = [(step.inputs, o, "read") for o in step.outputs]
            elif isinstance(step, Edge):
                pairs = [(step.source, step.target, step.kind)]
            elif isinstance(step, Product):
                pairs = [(step.cells, side, "block") for side in step.sides]
            else:
                pairs = [(step.rows, step.gate, "block")]
            for source, target, kind in pairs:
                for a in self.groups_in(source):
                    for b in self.groups_in(target):
                        links[Link(a, b, kind, step.site.node, step.site.source)] = None
        return [link for link in links if link.source != link.target or link.kind == "read"]

    @functools.cached_property
    @in_turn
    def ties(self) -> Ties:
        """Which op ties which axes together."""
        return Ties(self.system)

    def ties_of(self, axis: Axis) -> list[Tie]:
        """The chains from an axis to every other one of its group, as a tree."""
        places = axes_of(self.system, torch.tensor([axis.start]))
        return self.ties.described(int(places), lambda other: other.owner in self.params)

    @functools.cached_property
    @in_turn
    def data(self) -> GroupGraph:
        """Groups, links and nodes as plain data, with the ties and blocks of each group."""
        firsts: dict[int, Axis] = {}
        for axis in self.axes:
            firsts.setdefault(self.group_of(axis).id, axis)
        for k, axis in firsts.items():
            self.groups[k].ties = self.ties_of(axis)
        for blocks in self.system.blocks:
            for k in self.groups_in(blocks.atoms):
                block = Block(list(blocks.atoms.shape), blocks.site.node, blocks.site.source)
                if block not in self.groups[k].blocks:
                    self.groups[k].blocks.append(block)
        return GroupGraph(self.groups, self.links, self.nodes)

    @in_turn
    def explain(self, name: str) -> Explanation:
        """What ties a layer or parameter to others, and what stops its channels from going.

        `name`: of a submodule ("layer1.0.conv1") or of a parameter of it.
        Raises `UsageError` where no parameter has that name.
        """
        from demp_fx.channels.explain import explain

        return explain(self, name)

    def to_dict(self) -> dict[str, Any]:
        """Groups, links and nodes as JSON knows them; see `GroupGraph`."""
        return self.data.to_dict()

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return self.data.to_json()

    def to_networkx(self) -> nx.MultiDiGraph[int]:
        """A node for each group (`name`, `size`, `removable`, `dead`, `constant`, `macs`, and
        `members`, `pins`, `blocks`, `ties` as lists of dicts), an edge for each link (`kind`,
        `node`, `line`)."""
        return self.data.to_networkx()

    def __repr__(self) -> str:
        channels, gone = (sum(getattr(g, k) for g in self.groups) for k in ("size", "removable"))
        pinned = sum(1 for g in self.groups if g.pins)
        return (
            f"DependencyGraph({len(self.groups)} groups, {pinned} with pins; "
            f"{gone} of {channels} channels can go)"
        )

    def _repr_html_(self) -> str:
        """The groups as a table, for notebooks."""
        from demp_fx.report.fragments import groups_table

        return groups_table(self.data)


def _starts(axes: list[Axis]) -> Indices:
    return np.array([axis.start for axis in axes], dtype=np.int64)


def _streams(system: System) -> list[Axis]:
    """The axes of values between nodes that a read or edge leads from or to."""
    used = np.zeros(system.atoms, dtype=np.bool_)
    for step in system.flow:
        for atoms in (step.inputs, *step.outputs) if isinstance(step, Read) else (step.target,):
            used[atoms.numpy()] = True
    streams = [axis for axis in system.axes if axis.dim < 0]
    return [a for a, met in zip(streams, used[_starts(streams)].tolist(), strict=True) if met]


def _owners(system: System, firsts: Indices) -> Indices:
    """For each axis a number that all axes of its group share: those with a channel in common.
    `firsts`: the first atom of each."""
    whole = np.array([*system.whole], dtype=np.int64).reshape(-1, 2).T
    pairs = []
    for sides in (whole, [side.numpy() for side in system.ties]):
        a, b = (np.searchsorted(firsts, side, "right") - 1 for side in sides)
        new = np.ones(a.size, dtype=np.bool_)  # one tie for each run of atoms
        new[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
        pairs.append((torch.from_numpy(a[new]), torch.from_numpy(b[new])))
    return components(firsts.size, pairs).numpy()
