"""A dependency graph for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator

from demp_fx.channels.groups import Group, GroupGraph, Link
from demp_fx.report.style import colour, label_lines

_STYLES = {"read": "solid", "sum": "bold", "gather": "dashed", "spread": "dotted",
           "block": "dotted"}  # fmt: skip


def dumps(graph: GroupGraph, title: str) -> str:
    """DOT: a box for each group (a double one where it is pinned), an arrow for each link."""
    return "\n".join(_lines(graph, title)) + "\n"


def _lines(graph: GroupGraph, title: str) -> Iterator[str]:
    yield f"digraph {_quoted(title)} {{"
    yield "  rankdir=TB"
    yield '  node [shape=box style="rounded,filled" fontname="sans-serif" fontsize=10]'
    yield '  edge [fontname="sans-serif" fontsize=8 color="#666666"]'
    for group in graph.groups:
        yield _node(group)
    for link in graph.links:
        yield _edge(link)
    yield "}"


def _node(group: Group) -> str:
    pinned = " peripheries=2" if group.pins else ""
    label = _quoted("\n".join(label_lines(group)))
    return f'  g{group.id} [label={label} fillcolor="{colour(group.id)}"{pinned}]'


def _edge(link: Link) -> str:
    tip = _quoted(f"{link.kind} in {link.node} {link.line or ''}".strip())
    name = f" label={_quoted(link.node)}" if link.kind != "read" else ""
    return f"  g{link.source} -> g{link.target} [style={_STYLES[link.kind]}{name} tooltip={tip}]"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
