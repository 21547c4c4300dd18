"""A dependency graph in every format: what is written can be read, and says the same."""

from __future__ import annotations

import re
import shutil
import subprocess

import networkx as nx
import pytest

from demp_fx.channels.groups import Group, GroupGraph, Link, Member, Pin
from demp_fx.errors import UsageError
from demp_fx.report import dot, graphml, mermaid
from tests.report.networks import Dense, Residual, analyzed, chain

ODD = 'a "b" <c> #;|[d]{e} %% \\ é & end'
MADE_UP = GroupGraph(
    [Group(0, ODD, 3, members=[Member(ODD, 0, 3)], pins=[Pin(ODD, "op", ODD, None, 2)]),
     Group(7, "x->y", 2)],
    [Link(0, 7, kind, ODD, line) for kind, line in (("sum", None), ("read", "a.py:1"))],
    [],
)  # fmt: skip
GRAPHS = {
    "residual": analyzed(Residual(), 1, 3, 8, 8).data,
    "dense": analyzed(Dense(), 1, 3, 8, 8).data,
    "chain": analyzed(chain(), 1, 3, 8, 8).data,
    "odd names": MADE_UP,
}
each = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)


@each
def test_json_reads_back_equal(graph: GroupGraph) -> None:
    assert GroupGraph.from_json(graph.to_json()) == graph


@each
def test_graphml_reads_back_equal(graph: GroupGraph) -> None:
    expected = graph.to_networkx()
    found = graphml.loads(graphml.dumps(graph))
    assert dict(found.nodes(data=True)) == dict(expected.nodes(data=True))
    assert _edges(found) == _edges(expected)


def _edges(graph: nx.MultiDiGraph[int]) -> list[tuple[object, ...]]:
    return sorted(
        (a, b, *sorted((k, str(v)) for k, v in data.items()))
        for a, b, data in graph.edges(data=True)
    )


@pytest.mark.parametrize("text", ["", "{}", "<graphml/>", '{"groups": [{}], "links": []}'])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        GroupGraph.from_json(text)
    with pytest.raises(UsageError):
        graphml.loads(text)


@each
def test_dot_renders_every_group_and_link(graph: GroupGraph) -> None:
    if shutil.which("dot") is None:
        pytest.skip("Graphviz is not installed (apt-get install graphviz)")
    done = subprocess.run(
        ["dot", "-Tsvg"], input=dot.dumps(graph, ODD), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout.count('class="node"') == len(graph.groups)
    assert done.stdout.count('class="edge"') == len(graph.links)


_TEXT = r'"(?:[\w .\-\[\],:()]|<br>|#\d+;)*"'
_LINE = re.compile(
    rf"  (?:(?P<node>g\d+)(?:\[{_TEXT}\]|\[\[{_TEXT}\]\])"
    rf"|(?P<a>g\d+) (?:-->|==>|-\.->)(?:\|{_TEXT}\|)? (?P<b>g\d+)"
    r"|style (?P<styled>g\d+) fill:#[0-9a-f]{6},color:#000)"
)


@each
def test_mermaid_is_a_flowchart_of_every_group_and_link(graph: GroupGraph) -> None:
    first, *lines = mermaid.dumps(graph).splitlines()
    assert first == "flowchart TB"
    parsed = [match for line in lines if (match := _LINE.fullmatch(line))]
    assert len(parsed) == len(lines)
    nodes = [m["node"] for m in parsed if m["node"]]
    assert nodes == [f"g{group.id}" for group in graph.groups]
    ends = [(m["a"], m["b"]) for m in parsed if m["a"]]
    assert ends == [(f"g{link.source}", f"g{link.target}") for link in graph.links]


def test_only_what_matches_a_name_is_shown() -> None:
    deps = analyzed(Residual(), 1, 3, 8, 8)
    some = deps.data.only("stem")
    assert {g.name for g in some.groups} == {"stem.weight[0]", "stem.weight[1]"}
    assert {n.module for n in some.nodes} == {"stem"}
    assert all(len(n.inputs) == 0 for n in some.nodes)
    assert deps.data.only("st*").groups == some.groups
    with pytest.raises(UsageError, match="stemm"):
        deps.data.only("stemm")
