"""A dependency graph as GraphML, for networkx, Gephi and yEd."""

from __future__ import annotations

import io
import json
from typing import Any

import networkx as nx

from demp_fx.channels.groups import GroupGraph
from demp_fx.errors import UsageError

_LISTS = ("members", "pins", "blocks", "ties")


def dumps(graph: GroupGraph) -> str:
    """What `GroupGraph.to_networkx` gives, with lists as JSON, and without lines that are None."""
    flat = graph.to_networkx()
    for _, data in flat.nodes(data=True):
        data.update({key: json.dumps(data[key]) for key in _LISTS})
    for _, _, data in flat.edges(data=True):
        if data["line"] is None:
            del data["line"]
    text = io.BytesIO()
    nx.write_graphml(flat, text)
    return text.getvalue().decode("utf-8") + "\n"


def loads(text: str) -> nx.MultiDiGraph[int]:
    """The graph that `dumps` was given. Raises `UsageError` where the text is something else."""
    try:
        graph = nx.parse_graphml(text, node_type=int, force_multigraph=True)
        for _, node in graph.nodes(data=True):
            node.update({key: json.loads(node[key]) for key in _LISTS})
    except (nx.NetworkXError, SyntaxError, ValueError, KeyError) as error:
        raise UsageError(f"not a dependency graph in GraphML: {error!r}") from error
    if not isinstance(graph, nx.MultiDiGraph):
        raise UsageError("not a dependency graph: its edges have no direction")
    edge: dict[str, Any]
    for _, _, edge in graph.edges(data=True):
        edge.setdefault("line", None)
        edge.pop("id", None)
    return graph
