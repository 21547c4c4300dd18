"""Pages stand on their own, hold everything, and are laid out without overlaps."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import demp_fx
from demp_fx.channels.groups import Group, GroupGraph, Node
from demp_fx.emit import folder
from demp_fx.report import compilation, inspection
from demp_fx.report.layout import BOX_HEIGHT, BOX_WIDTH, Layout, layout
from tests.report.networks import Dense, Residual, analyzed, chain
from tests.zoo.networks import NETWORKS

LOADS = re.compile(r"""https?://(?!www\.w3\.org/2000/svg)|@import|url\(|\bsrc=|fetch\(|import\(""")
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.S)


class Nesting(HTMLParser):
    """Raises where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in {"meta", "link", "input", "br", "rect"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag


def data_of(page: str) -> dict[str, Any]:
    found = DATA.search(page)
    assert found is not None
    result: dict[str, Any] = json.loads(found[1])
    return result


@pytest.fixture(scope="module")
def resnet50() -> demp_fx.DependencyGraph:
    return analyzed(NETWORKS["resnet50"].build().eval(), 1, 3, 64, 64)


def test_the_page_of_a_network_loads_nothing_and_is_small(
    resnet50: demp_fx.DependencyGraph,
) -> None:
    page = inspection.page_of(resnet50.data, "ResNet")
    Nesting(page)
    assert LOADS.search(page) is None
    assert len(page.encode()) < 2_000_000
    data = data_of(page)
    assert [g["name"] for g in data["groups"]] == [g.name for g in resnet50.groups]
    assert [n["name"] for n in data["nodes"]] == [n.name for n in resnet50.nodes]
    assert "self.conv1(x)" in " ".join(data["code"].values())
    assert {b[0] for b in data["bands"]} >= {"layer1.0", "layer2.3", "layer4.2", "fc"}


def test_names_cannot_break_out_of_the_page() -> None:
    name = "</script><script>alert(1)</script>"
    graph = GroupGraph([Group(0, name, 1)], [], [Node(name, name, name, [], "", [1], {0: 1}, None)])
    page = inspection.page_of(graph, name)
    Nesting(page)
    assert "<script>alert" not in page
    assert data_of(page)["groups"][0]["name"] == name


@pytest.mark.parametrize("model", [Residual(), Dense(), chain()], ids=lambda m: type(m).__name__)
def test_edges_lead_downward_and_boxes_are_apart(model: torch.nn.Module) -> None:
    check_layout(analyzed(model, 1, 3, 8, 8).nodes)


def test_resnet50_is_laid_out_with_its_shortcuts_on_lanes(
    resnet50: demp_fx.DependencyGraph,
) -> None:
    placed = check_layout(resnet50.nodes)
    sums = {n.name for n in resnet50.nodes if n.joins == "sum"}
    assert len(sums) == 16
    assert {w.target for w in placed.wires if w.lane is not None} >= sums


def check_layout(nodes: list[Node]) -> Layout:
    placed = layout(nodes)
    corners = [(p.x, p.y) for p in placed.places.values()]
    for k, (x, y) in enumerate(corners):
        assert all(abs(x - a) >= BOX_WIDTH or abs(y - b) >= BOX_HEIGHT for a, b in corners[:k])
        assert x + BOX_WIDTH <= placed.width
        assert y + BOX_HEIGHT <= placed.height
    lanes: dict[float, list[tuple[int, int, str]]] = {}
    for wire in placed.wires:
        start, end = placed.places[wire.source].row, placed.places[wire.target].row
        assert start < end
        assert (wire.lane is None) == (end == start + 1)
        if wire.lane is not None:
            lanes.setdefault(wire.lane, []).append((start, end, wire.source))
    for taken in lanes.values():
        for start, end, source in taken:
            assert all(b <= start or end <= a or s == source for a, b, s in taken)
    return placed


def test_a_compilation_leaves_a_page_with_its_figures(tmp_path: Path) -> None:
    result = demp_fx.compile(chain(), torch.randn(2, 3, 8, 8))
    out = folder.write(result, tmp_path / "out")
    page = (out / folder.PAGE).read_text()
    Nesting(page)
    assert LOADS.search(page) is None
    report = result.report
    for part in (f"{report.params_before:,} → {report.params_after:,}", "8 → 3",
                 "5 channels are zero or constant, by the weights alone",
                 "Nothing: no data was watched", "it is the network&#x27;s output",
                 f"{report.verification.eval_error:.1e}"):  # fmt: skip
        assert part in page


def test_what_was_watched_is_told_apart_from_what_was_proven() -> None:
    model = chain()
    with torch.no_grad():
        model.get_parameter("1.weight")[5] = 1e-3
        model.get_parameter("1.bias")[5] = -10
    batches = [torch.randn(4, 3, 8, 8)]
    report = demp_fx.compile(model, batches[0], calibration=batches).report
    page = compilation.page_of(report)
    assumed = page[page.index("What was assumed") : page.index("Channels by layer")]
    assert "1 channels that the weights do not prove dead never fired on the 4" in assumed
