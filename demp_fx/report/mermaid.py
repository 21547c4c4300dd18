"""A dependency graph for Mermaid, as Markdown on GitHub shows it."""

from __future__ import annotations

from collections.abc import Iterator

from demp_fx.channels.groups import GroupGraph
from demp_fx.report.style import colour, label_lines

_ARROWS = {"read": "-->", "sum": "==>", "gather": "-.->", "spread": "-.->", "block": "-.->"}


def dumps(graph: GroupGraph) -> str:
    """A flowchart: a box for each group (a double one where it is pinned), an arrow for a link."""
    return "\n".join(_lines(graph)) + "\n"


def _lines(graph: GroupGraph) -> Iterator[str]:
    yield "flowchart TB"
    for group in graph.groups:
        left, right = ("[[", "]]") if group.pins else ("[", "]")
        text = "<br>".join(_escaped(line) for line in label_lines(group))
        yield f'  g{group.id}{left}"{text}"{right}'
    for link in graph.links:
        name = f'|"{_escaped(link.node)}"|' if link.kind != "read" else ""
        yield f"  g{link.source} {_ARROWS[link.kind]}{name} g{link.target}"
    for group in graph.groups:
        yield f"  style g{group.id} fill:{colour(group.id)},color:#000"


def _escaped(text: str) -> str:
    """Characters with a meaning as the entities that Mermaid knows."""
    return "".join(c if c.isalnum() or c in " ._-[],:()" else f"#{ord(c)};" for c in text)
