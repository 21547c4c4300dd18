"""What a group says of its channels, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import demp_fx
from demp_fx.channels.explain import NEEDED, AxisReason
from demp_fx.channels.groups import Group
from demp_fx.errors import UsageError
from tests.report.networks import Dense, Residual, analyzed, chain


def group(deps: demp_fx.DependencyGraph, name: str) -> Group:
    return next(g for g in deps.groups if name in map(str, g.members))


def reason(deps: demp_fx.DependencyGraph, axis: str) -> AxisReason:
    layer = axis.rpartition(".")[0]
    return next(r for r in deps.explain(layer).axes if str(r.axis) == axis)


def test_channels_are_dead_constant_or_live() -> None:
    found = group(analyzed(chain(), 1, 3, 8, 8), "0.weight[0]")
    assert (found.size, found.dead, found.constant, found.live) == (8, 3, 2, 3)
    assert found.removable == 5


def test_macs_are_those_that_vanish_with_the_group() -> None:
    deps = analyzed(chain(), 2, 3, 8, 8)
    first, second = 2 * 36 * 8 * 3 * 9, 2 * 36 * 5 * 8
    assert group(deps, "0.weight[0]").macs == first + second
    assert group(deps, "0.weight[1]").macs == first
    assert group(deps, "3.weight[0]").macs == second


def test_a_part_of_a_concat_costs_its_part_of_the_reader() -> None:
    deps = analyzed(Dense(), 1, 3, 4, 4)
    found = {m.name for m in group(deps, "left.weight[0]").members}
    assert {"left.weight", "right.weight", "head.weight"} <= found
    assert group(deps, "left.weight[0]").macs == 16 * (9 * 3 + 2 * 9)


def test_every_member_is_reached_by_a_chain_of_ops() -> None:
    deps = analyzed(Residual(), 1, 3, 8, 8)
    for one in deps.data.groups:
        reached = {str(m) for m in one.members[:1]}
        for tie in one.ties:
            assert tie.a in reached, "parents come first"
            reached.add(tie.b)
        assert {str(m) for m in one.members} <= reached


def test_a_chain_names_ops_nodes_and_lines() -> None:
    ties = reason(analyzed(Residual(), 1, 3, 8, 8), "conv.weight[0]").ties
    norm = next(t for t in ties if t.b == "norm.weight[0]")
    assert norm.a == "conv.weight[0]"
    assert "batch_norm" in norm.op
    assert norm.node == "norm"
    assert "networks.py:" in str(norm.source)


def test_what_stops_channels_is_told_with_the_way_there() -> None:
    deps = analyzed(Residual(), 1, 3, 8, 8)
    here = reason(deps, "conv.weight[1]")
    assert [(s.node, s.channels, s.via) for s in here.stops if s.reason == NEEDED] == [
        ("conv", 6, ())
    ]
    behind = reason(deps, "conv.weight[0]")
    (stop,) = [s for s in behind.stops if s.reason == NEEDED]
    assert stop.node == "head"
    assert [link.kind for link in stop.via] == ["sum"]
    assert [link.kind for link in behind.links] == ["read", "sum"]


def test_the_networks_output_is_a_reason() -> None:
    stops = reason(analyzed(Residual(), 1, 3, 8, 8), "head.weight[0]").stops
    assert [(s.reason, s.channels) for s in stops] == [("it is the network's output", 4)]


def test_dead_channels_are_stopped_by_nothing() -> None:
    deps = analyzed(chain(), 1, 3, 8, 8)
    (stop,) = reason(deps, "0.weight[0]").stops
    assert stop.channels == 3


def test_an_answer_reads_as_text() -> None:
    text = str(analyzed(Residual(), 1, 3, 8, 8).explain("conv"))
    for part in ("conv.weight[0]", "norm.weight[0]", "self.norm(self.conv(x))",
                 "over the residual sum add", "over the branch into conv"):  # fmt: skip
        assert part in text


def test_a_name_that_is_not_there_gets_the_nearest_ones() -> None:
    with pytest.raises(UsageError, match=r"there is .*conv"):
        analyzed(Residual(), 1, 3, 8, 8).explain("convv")


def test_a_parameter_without_channels_has_an_answer_too() -> None:
    net = nn.Sequential(nn.Linear(6, 1))
    net.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    net[0].register_parameter("tied", net[0].weight)
    deps = analyzed(net, 2, 6)
    for name in ("0.bias", "unused"):
        assert "has no channels" in str(deps.explain(name))
    for name in ("0", "0.tied"):
        assert [str(r.axis) for r in deps.explain(name).axes] == ["0.weight[1]"]


def test_a_value_that_no_parameter_is_tied_to_has_a_group() -> None:
    deps = analyzed(Residual(), 1, 3, 8, 8)
    names = {g.name for g in deps.groups if not g.members}
    assert names <= {link.name for link in deps.groups}
    node = next(n for n in deps.nodes if n.name == "add")
    assert node.joins == "sum"
    assert set(node.inputs) == {"relu", "norm"}
    assert [deps.groups[g].size for g in node.groups] == [6]


def test_repr_and_notebook_say_what_is_there() -> None:
    deps = analyzed(chain(), 1, 3, 8, 8)
    assert repr(deps) == "DependencyGraph(3 groups, 2 with pins; 5 of 16 channels can go)"
    page = deps._repr_html_()
    assert page.count("<tr>") == 4
    assert "0.weight[0]" in page
