"""One page with the network, its pruning groups, and everything that is known about them."""

from __future__ import annotations

import html
import json
from itertools import groupby
from typing import Any

from demp_fx.channels.groups import Group, GroupGraph, Node
from demp_fx.report.layout import BOX_HEIGHT, BOX_WIDTH, layout
from demp_fx.report.source import code_at, short
from demp_fx.report.style import asset, page

_BANDS = 24  # how many submodules to mark beside the network, at most


def page_of(graph: GroupGraph, title: str) -> str:
    """The page as HTML. It loads nothing, and works in any browser of the last years."""
    data = json.dumps(_data(graph), separators=(",", ":")).replace("<", "\\u003c")
    body = asset("inspect.html").replace("TITLE", html.escape(title))
    body += f'<script type="application/json" id="data">{data}</script>'
    return page(f"{title}: pruning groups", body, asset("inspect.js"), asset("inspect.css"))


def _data(graph: GroupGraph) -> dict[str, Any]:
    placed = layout(graph.nodes)
    number = {node.name: k for k, node in enumerate(graph.nodes)}
    return {
        "width": placed.width, "height": placed.height, "box": [BOX_WIDTH, BOX_HEIGHT],
        "nodes": [
            {"name": n.name, "label": _label(n), "kind": n.kind, "module": n.module,
             "shape": n.shape, "joins": n.joins, "groups": list(n.groups.items()),
             "line": short(n.source), "x": placed.places[n.name].x,
             "y": placed.places[n.name].y}
            for n in graph.nodes
        ],
        "wires": [[number[w.source], number[w.target], w.lane] for w in placed.wires],
        "groups": [_group(g) for g in graph.groups],
        "links": [[k.source, k.target, k.kind, k.node, short(k.line)] for k in graph.links],
        "bands": [[name, number[a.name], number[b.name]] for name, a, b in _bands(graph.nodes)],
        "code": _code(graph),
    }  # fmt: skip


def _label(node: Node) -> str:
    """The name of the layer that a node calls, or its own."""
    same = node.name.startswith(node.module.replace(".", "_"))
    return node.module if node.module and same else node.name


def _group(group: Group) -> dict[str, Any]:
    return {
        "id": group.id, "name": group.name, "size": group.size, "removable": group.removable,
        "dead": group.dead, "constant": group.constant, "macs": group.macs,
        "members": [[str(m), m.size] for m in group.members],
        "pins": [[p.channels, p.reason, p.op, p.node, short(p.source)] for p in group.pins],
        "blocks": [[b.sizes, b.node, short(b.source)] for b in group.blocks],
        "ties": [
            [a, [t.b for t in same], op, node, short(line)]
            for (a, op, node, line), same in groupby(
                group.ties, key=lambda t: (t.a, t.op, t.node, t.source)
            )
        ],
    }  # fmt: skip


def _code(graph: GroupGraph) -> dict[str, str]:
    """The text of every line that the page names."""
    lines = {p.source for g in graph.groups for p in g.pins}
    lines |= {t.source for g in graph.groups for t in g.ties}
    lines |= {b.source for g in graph.groups for b in g.blocks}
    lines |= {n.source for n in graph.nodes} | {k.line for k in graph.links}
    return {short(line): code for line in sorted(filter(None, lines)) if (code := code_at(line))}


def _bands(nodes: list[Node]) -> list[tuple[str, Node, Node]]:
    """Stretches of nodes in one submodule: its name, the first and the last node. As deep in the
    hierarchy as gives not too many names."""
    found = _stretches(nodes, 1)
    for depth in range(2, 8):
        deeper = _stretches(nodes, depth)
        if len({name for name, _, _ in deeper}) > _BANDS:
            break
        found = deeper
    return found


def _stretches(nodes: list[Node], depth: int) -> list[tuple[str, Node, Node]]:
    found: list[tuple[str, Node, Node]] = []
    for node in nodes:
        name = ".".join(node.module.split(".")[:depth])
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], node)
        else:
            found.append((name, node, node))
    return [stretch for stretch in found if stretch[0]]
