"""Pieces of HTML that more than one page uses."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from demp_fx.channels.groups import GroupGraph

_NAME, _BAR, _ROW = 250, 560, 15


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    """A table of text, whose lines stay lines; `words`: set to the left, as numbers are not."""
    kind = ' class="words"' if words else ""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    top = f"<thead><tr>{head}</tr></thead>" if any(headings) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    ).replace("\n", "<br>")
    return f"<table{kind}>{top}<tbody>{body}</tbody></table>"


def section(title: str, content: str) -> str:
    """A part of a page, under a heading."""
    return f"<section><h2>{html.escape(title)}</h2>\n{content}</section>"


def listed(lines: Iterable[str]) -> str:
    """Sentences, one below the other."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def cards(rows: Iterable[tuple[str, str, str]]) -> str:
    """Figures to see first: what, how much, and the small print."""
    boxes = "".join(
        f'<div class="card"><span class="soft">{html.escape(what)}</span>'
        f'<b>{html.escape(figure)}</b><span class="soft">{html.escape(more)}</span></div>'
        for what, figure, more in rows
    )
    return f'<div class="cards">{boxes}</div>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Names and their colours (as CSS has them)."""
    boxes = (
        f'<span class="key"><i class="swatch" style="background:{colour}"></i>{html.escape(name)}'
        "</span>"
        for name, colour in entries
    )
    return f"<p>{' '.join(boxes)}</p>"


def bars(rows: Sequence[tuple[str, int, int]]) -> str:
    """A bar for each (name, before, after), as SVG."""
    largest = max((before for _, before, _ in rows), default=1) or 1
    parts = []
    for k, (name, before, after) in enumerate(rows):
        y, unit = k * _ROW, _BAR / largest
        numbers = f"{before}" if before == after else f"{before} → {after}"
        text = html.escape(name if len(name) < 40 else f"…{name[-38:]}")
        parts.append(
            f'<text x="{_NAME - 6}" y="{y + 11}" text-anchor="end">{text}</text>'
            f'<rect x="{_NAME}" y="{y + 2}" width="{before * unit:.1f}" height="{_ROW - 4}" rx="2" '
            f'style="fill:var(--before)"/>'
            f'<rect x="{_NAME}" y="{y + 2}" width="{after * unit:.1f}" height="{_ROW - 4}" rx="2" '
            f'style="fill:var(--accent)"/>'
            f'<text x="{_NAME + before * unit + 6:.1f}" y="{y + 11}">{numbers}</text>'
        )
    width, height = _NAME + _BAR + 90, len(rows) * _ROW
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="widths before and after">{"".join(parts)}</svg>'
    )


def groups_table(graph: GroupGraph) -> str:
    """The pruning groups, a row each."""
    rows = [
        (str(g.id), g.name, str(len(g.members)), str(g.size), str(g.removable), f"{g.macs:,}",
         "; ".join(dict.fromkeys(p.reason for p in g.pins)))
        for g in graph.groups
    ]  # fmt: skip
    return table(("group", "first", "axes", "channels", "can go", "MACs", "pinned"), rows)
