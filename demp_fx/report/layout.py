"""Where the nodes of a network go on a page: layers by longest path, long edges on lanes beside.

Every node is a box in the row of its longest path from an input. An edge to the next row is drawn
straight; all longer ones of a node share a lane, right of the boxes, from which each reader taps:
residual and dense connections look like the buses that they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from demp_fx.channels.groups import Node

BOX_WIDTH, BOX_HEIGHT, ROW, GAP, LANE = 190, 30, 46, 16, 9


@dataclass(frozen=True)
class Place:
    """The upper left corner of a box, and its row."""

    x: float
    y: float
    row: int


@dataclass(frozen=True)
class Wire:
    """An edge; `lane`: the x of the lane that it runs on, None where it goes straight."""

    source: str
    target: str
    lane: float | None


@dataclass(frozen=True)
class Layout:
    """Places by node, and edges; `width` and `height` of it all, in pixels at scale 1."""

    places: dict[str, Place]
    wires: list[Wire]
    width: float
    height: float


def layout(nodes: Sequence[Node]) -> Layout:
    """Lay out nodes that are in order of execution. Takes time linear in nodes and edges."""
    rows = _rows(nodes)
    members: dict[int, list[Node]] = {}
    for node in nodes:
        members.setdefault(rows[node.name], []).append(node)
    column: dict[str, int] = {}
    for row in sorted(members):
        _order(members[row], column)
    columns = 1 + max(column.values(), default=0)
    places = {
        n.name: Place(column[n.name] * (BOX_WIDTH + GAP), rows[n.name] * ROW, rows[n.name])
        for n in nodes
    }
    right = columns * (BOX_WIDTH + GAP)
    lanes = _lanes(nodes, rows)
    wires = [
        Wire(source, node.name,
             right + lanes[source] * LANE if rows[node.name] - rows[source] > 1 else None)
        for node in nodes for source in node.inputs
    ]  # fmt: skip
    width = right + LANE * (1 + max(lanes.values(), default=-1))
    return Layout(places, wires, width, ROW * (1 + max(rows.values(), default=0)))


def _rows(nodes: Sequence[Node]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for node in nodes:
        rows[node.name] = 1 + max((rows[i] for i in node.inputs), default=-1)
    return rows


def _order(row: list[Node], column: dict[str, int]) -> None:
    """Columns for the nodes of one row: below what feeds them, as far as there is room."""

    def wish(node: Node) -> float:
        above = [column[i] for i in node.inputs if i in column]
        return sum(above) / len(above) if above else 0.0

    for k, node in enumerate(sorted(row, key=wish)):
        column[node.name] = k


def _lanes(nodes: Sequence[Node], rows: dict[str, int]) -> dict[str, int]:
    """A lane for each node with edges beyond the next row; lanes are free again below the last."""
    until: dict[str, int] = {}
    for node in nodes:
        for source in node.inputs:
            if rows[node.name] - rows[source] > 1:
                until[source] = max(until.get(source, 0), rows[node.name])
    lanes: dict[str, int] = {}
    busy: list[int] = []  # the row to which each lane is taken
    for name in sorted(until, key=lambda n: (rows[n], until[n])):
        lane = next((k for k, end in enumerate(busy) if end <= rows[name]), len(busy))
        busy[lane : lane + 1] = [until[name]]
        lanes[name] = lane
    return lanes
