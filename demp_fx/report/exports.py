"""A dependency graph in every format."""

from __future__ import annotations

from rich.console import RenderableType

from demp_fx.channels.groups import GroupGraph
from demp_fx.report import dot, inspection, mermaid
from demp_fx.report.explain import group_tree


def export(graph: GroupGraph, form: str, title: str) -> str | RenderableType:
    """The graph as a "tree" for the terminal, or as text: "json", "dot", "mermaid", "graphml",
    "html"."""
    if form == "tree":
        return group_tree(graph, title)
    if form == "json":
        return graph.to_json()
    if form == "dot":
        return dot.dumps(graph, title)
    if form == "mermaid":
        return mermaid.dumps(graph)
    if form == "graphml":
        from demp_fx.report import graphml

        return graphml.dumps(graph)
    return inspection.page_of(graph, title)
