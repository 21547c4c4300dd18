"""Why the channels of a layer are tied to those of others, and what stops them from going."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from demp_fx.channels.constants import dead_at, foldable
from demp_fx.channels.constraints import Site
from demp_fx.channels.groups import Group, Link, Member, Tie, matches
from demp_fx.channels.values import STRUCTURE
from demp_fx.errors import UsageError

if TYPE_CHECKING:
    from demp_fx.channels.dependencies import DependencyGraph

NEEDED = "is read, and nothing proves it zero or constant"


@dataclass(frozen=True)
class Stop:
    """Something that keeps channels: why, by which op, at which node and line, and how many.

    `via`: the links over which the channels of the explained group get there.
    """

    reason: str
    op: str
    node: str
    source: str | None
    channels: int
    via: tuple[Link, ...] = ()


@dataclass(frozen=True)
class AxisReason:
    """One axis of what was asked for: its group, what ties it to the others, what stops it.

    `links`: from and to other groups. `carriers`: the nodes whose values carry its channels.
    """

    axis: Member
    group: Group
    ties: list[Tie]
    links: list[Link]
    carriers: list[str] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)


@dataclass(frozen=True)
class Explanation:
    """The answer to "why?" about one layer or parameter. `groups`: the names of all, by id."""

    name: str
    axes: list[AxisReason]
    groups: dict[int, str]

    def __str__(self) -> str:
        from demp_fx.report.explain import as_text

        return as_text(self)


def explain(deps: DependencyGraph, name: str) -> Explanation:
    """See `DependencyGraph.explain`."""
    owners = {owner for known, owner in deps.names.items() if matches(known, name)}
    axes = [a for a in deps.axes if a.owner in owners]
    if not owners:
        raise UsageError(f"no layer, parameter or buffer is called {name!r}; {_near(deps, name)}")
    stops = _Stops(deps)
    told: set[int] = set()
    reasons = []
    for axis in axes:
        group = deps.group_of(axis)
        if group.id not in told:
            told.add(group.id)
            carriers = [n.name for n in deps.nodes if group.id in n.groups]
            reasons.append(
                AxisReason(Member(axis.owner, axis.dim, axis.size), group, deps.ties_of(axis),
                           [k for k in deps.links if group.id in (k.source, k.target)],
                           carriers, list(stops.of(group)))
            )  # fmt: skip
    return Explanation(name, reasons, {g.id: g.name for g in deps.groups})


def _near(deps: DependencyGraph, name: str) -> str:
    layers = {known.rpartition(".")[0] for known in deps.names} - {""}
    close = difflib.get_close_matches(name, [*layers, *deps.names], 3)
    return f"there is {', '.join(close)}" if close else "see demp-fx inspect for the names"


class _Stops:
    """What keeps the channels of each group, here or behind edges that lead on from it."""

    def __init__(self, deps: DependencyGraph) -> None:
        self.deps = deps
        self.here: dict[int, list[Stop]] = {}
        folds = foldable(deps.system)
        for pin in deps.system.pins:
            active = all(bool(deps.solution.kept(o).any()) for o in pin.outputs)
            if pin.reason != STRUCTURE and active:
                self._add(pin.atoms, pin.reason, pin.site)
        for read in deps.system.reads:
            if all(bool(deps.solution.kept(o).any()) for o in read.outputs):
                dead = dead_at(read, folds)
                self._add(read.inputs if dead is None else read.inputs[~dead], NEEDED, read.site)
        for axis in deps.solution.revived:
            site = Site("", axis.owner)
            self._add(axis.atoms[:1], "all could go, but torch has no layers of width zero", site)

    def _add(self, atoms: torch.Tensor, reason: str, site: Site) -> None:
        for group, channels in self.deps.groups_in(atoms).items():
            stop = Stop(reason, site.op, site.node, site.source, channels)
            self.here.setdefault(group, []).append(stop)

    def of(self, group: Group) -> Iterator[Stop]:
        """Everything that stops a group, the nearest first."""
        onward: dict[int, list[Link]] = {}
        for link in self.deps.links:
            if link.kind != "read":
                onward.setdefault(link.source, []).append(link)
        waiting: deque[tuple[int, tuple[Link, ...]]] = deque([(group.id, ())])
        seen = {group.id}
        while waiting:
            here, via = waiting.popleft()
            for s in self.here.get(here, ()):
                yield Stop(s.reason, s.op, s.node, s.source, s.channels, via)
            for link in onward.get(here, ()):
                if link.target not in seen:
                    seen.add(link.target)
                    waiting.append((link.target, (*via, link)))
