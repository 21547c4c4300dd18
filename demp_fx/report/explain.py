"""Groups and answers to "why?" for a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from demp_fx.channels.explain import AxisReason, Explanation, Stop
from demp_fx.channels.groups import Group, GroupGraph, Link, Tie
from demp_fx.report.source import code_at, place

_STOPS = 8


def group_tree(graph: GroupGraph, title: str) -> Tree:
    """Pruning groups, what is in them, and what keeps channels of theirs."""
    tree = Tree(f"[bold]{escape(title)}[/bold]: {len(graph.groups)} groups")
    for group in graph.groups:
        branch = tree.add(f"[bold]group {group.id}[/bold]: {escape(counts(group))}")
        if not group.members:
            branch.add(escape(f"no parameter; the value {group.name}"))
        for member in group.members:
            branch.add(escape(f"{member} ({member.size})"))
        for block in group.blocks:
            sizes = " x ".join(map(str, block.sizes))
            branch.add(escape(f"in equal blocks, {sizes}, by {block.node}{place(block.source)}"))
        for pin in group.pins:
            line = f"pinned: {pin.channels} by {pin.op} in {pin.node}{place(pin.source)}"
            branch.add(f"[yellow]{escape(f'{line}: {pin.reason}')}[/yellow]")
    return tree


def counts(group: Group) -> str:
    """The channels of a group in words."""
    parts = [f"{group.size} channels"]
    for n, what in ((group.dead, "dead"), (group.constant, "constant"), (group.live, "live")):
        parts += [f"{n} {what}"] if n else []
    return f"{', '.join(parts)}; {group.removable} removable; {group.macs:,} MACs"


def why_tree(found: Explanation) -> Tree:
    """The chains of ops behind every group of a layer, and what stops its channels."""
    tree = Tree(f"[bold]{escape(found.name)}[/bold]")
    for reason in found.axes:
        group = reason.group
        branch = tree.add(
            f"[bold]{escape(str(reason.axis))}[/bold] is in group {group.id}: "
            f"{escape(counts(group))}"
        )
        _ties(branch, reason)
        _links(branch, reason, found.groups)
        if reason.carriers:
            branch.add(escape(f"carried by {', '.join(reason.carriers)}"))
        _stops(branch, reason)
    if not found.axes:
        tree.add("has no channels that could go: it stays as it is")
    return tree


def _ties(branch: Tree, reason: AxisReason) -> None:
    """Every axis below the one that it is tied to."""
    if not reason.ties:
        branch.add("tied to nothing else")
        return
    places = {str(reason.axis): branch.add("tied to")}
    for (a, _, _), same in groupby(reason.ties, key=lambda t: (t.a, t.op, t.node)):
        ties = list(same)
        names = ", ".join(tie.b for tie in ties)
        here = places[a].add(f"[cyan]{escape(names)}[/cyan] by {_by(ties[0])}")
        places.update({tie.b: here for tie in ties})


def _links(branch: Tree, reason: AxisReason, names: dict[int, str]) -> None:
    """The groups that its channels come from, and those that they go on into."""
    here = reason.group.id
    onward = [link for link in reason.links if link.kind != "read"]
    for link in onward:
        if link.target == here:
            way = f"fed by group {link.source} ({names[link.source]})"
            branch.add(escape(f"{way} over {_crossing(link)}"))
    for link in onward:
        if link.source == here:
            way = f"feeds group {link.target} ({names[link.target]})"
            branch.add(escape(f"{way} over {_crossing(link)}"))


def _stops(branch: Tree, reason: AxisReason) -> None:
    group = reason.group
    if not reason.stops:
        branch.add("[green]nothing stops its channels from going[/green]")
        return
    kept = group.size - group.removable
    heading = branch.add(f"[yellow]what stops {kept} of {group.size} channels[/yellow]")
    shown = list(_merged(reason.stops))
    for stop, times in shown[:_STOPS]:
        more = f" (and {times - 1} more ops there)" if times > 1 else ""
        here = heading.add(f"{stop.channels}: {escape(stop.reason)}{more}: {_by(stop)}")
        for link in stop.via:
            here.add(escape(f"gets there over {_crossing(link)}"))
    if len(shown) > _STOPS:
        heading.add(f"and {len(shown) - _STOPS} more places, further on")


def _merged(stops: Iterable[Stop]) -> Iterable[tuple[Stop, int]]:
    """One of the stops with the same reason at the same node, and how many those are."""
    for _, same in groupby(stops, key=lambda s: (s.reason, s.node, s.channels)):
        first, *rest = same
        yield first, 1 + len(rest)


def _crossing(link: Link) -> str:
    names = {
        "sum": "the residual sum", "gather": "the branch into", "spread": "the way into",
        "block": "the blocks of",
    }  # fmt: skip
    return f"{names[link.kind]} {link.node}{place(link.line)}"


def _by(what: Tie | Stop) -> str:
    op = f"{what.op} in " if what.op else ""
    line = code_at(what.source)
    code = f"  [dim]{escape(line)}[/dim]" if line else ""
    return f"{escape(f'{op}{what.node}{place(what.source)}')}{code}"


def as_text(found: Explanation) -> str:
    """`why_tree` as plain text."""
    text = io.StringIO()
    Console(file=text, width=160).print(why_tree(found))
    return text.getvalue()
