"""Pieces of HTML that more than one page uses."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from demp_fx.channels.groups import GroupGraph


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def section(title: str, content: str) -> str:
    """A part of a page, under a heading."""
    return f"<section><h2>{html.escape(title)}</h2>\n{content}</section>"


def groups_table(graph: GroupGraph) -> str:
    """The pruning groups, a row each."""
    rows = [
        (str(g.id), g.name, str(len(g.members)), str(g.size), str(g.removable), f"{g.macs:,}",
         "; ".join(dict.fromkeys(p.reason for p in g.pins)))
        for g in graph.groups
    ]  # fmt: skip
    return table(("group", "first", "axes", "channels", "can go", "MACs", "pinned"), rows)
