"""The dependency graph: what is coupled, what is pinned, by which op, at which line."""

from __future__ import annotations

import json

import networkx as nx
import pytest
import torch
from torch import nn

import demp_fx
from demp_fx.channels.facts import Facts
from demp_fx.errors import UsageError
from tests.report import networks
from tests.report.networks import Residual


def groups_of(model: nn.Module, *shape: int) -> demp_fx.DependencyGraph:
    return demp_fx.analyze(demp_fx.trace(model, torch.randn(*shape)))


def members(deps: demp_fx.DependencyGraph, name: str, dim: int) -> set[str]:
    """The group of one axis, as 'name[dim]'."""
    for group in deps.groups:
        axes = {f"{m.name}[{m.dim}]" for m in group.members}
        if f"{name}[{dim}]" in axes:
            return axes
    raise AssertionError(f"{name}[{dim}] is in no group")


def test_a_chain_is_grouped_by_its_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    deps = groups_of(model, 1, 3, 8, 8)
    assert members(deps, "0.weight", 0) == {
        "0.weight[0]", "0.bias[0]", "1.weight[0]", "1.bias[0]", "1.running_mean[0]",
        "1.running_var[0]", "3.weight[1]",
    }  # fmt: skip


def test_a_flattened_axis_is_coupled_place_by_place() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    deps = groups_of(model, 1, 1, 8, 8)
    group = next(g for g in deps.groups if g.members[0].name == "0.weight" and g.size == 4)
    assert {(m.name, m.dim, m.size) for m in group.members} == {
        ("0.weight", 0, 4), ("0.bias", 0, 4), ("2.weight", 1, 144),
    }  # fmt: skip


def test_inputs_and_outputs_are_pinned_with_op_node_and_line() -> None:
    deps = groups_of(Residual(), 1, 3, 8, 8)
    pins = [pin for group in deps.groups for pin in group.pins]
    by_reason = {pin.reason: pin for pin in pins}
    assert by_reason["it is the network's output"].channels == 4
    reads = next(pin for reason, pin in by_reason.items() if "network's input" in reason)
    assert (reads.op, reads.node, reads.channels) == ("aten.convolution.default", "stem", 3)
    assert all(f"{networks.__file__}:" in str(pin.source) for pin in pins)


def test_a_residual_sum_links_groups_instead_of_merging_them() -> None:
    deps = groups_of(Residual(), 1, 3, 8, 8)
    assert "stem.weight[0]" not in members(deps, "conv.weight", 0)
    assert {link.kind for link in deps.links} == {"read", "sum", "gather"}


def test_the_graph_is_there_as_networkx_and_json() -> None:
    deps = groups_of(Residual(), 1, 3, 8, 8)
    graph = deps.to_networkx()
    assert isinstance(graph, nx.MultiDiGraph)
    assert set(graph.nodes) == {group.id for group in deps.groups}
    assert all({"size", "removable", "members", "pins"} <= set(d) for _, d in graph.nodes.data())
    data = json.loads(deps.to_json())
    assert [g["size"] for g in data["groups"]] == [g.size for g in deps.groups]
    assert len(data["links"]) == graph.number_of_edges()


def test_what_can_go_is_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    nn.init.zeros_(model.get_parameter("1.weight"))
    with torch.no_grad():
        model.get_parameter("1.weight")[:5] = 1
    group = next(g for g in groups_of(model, 1, 3, 8, 8).groups if g.size == 8)
    assert group.removable == 3


def test_analysis_changes_nothing_and_needs_no_weights_in_memory() -> None:
    with torch.device("meta"):
        model = Residual().train()
    graph = demp_fx.trace(model, torch.empty(1, 3, 8, 8, device="meta"))
    deps = demp_fx.analyze(graph)
    assert len(deps.groups) > 3
    assert model.training
    assert all(m.training for m in model.modules())
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_a_graph_without_example_inputs_is_refused() -> None:
    with pytest.raises(UsageError, match=r"demp_fx\.trace"):
        demp_fx.analyze(torch.fx.symbolic_trace(nn.Linear(2, 2)))


def test_of_slices_without_elements_nothing_is_known() -> None:
    zeros = Facts.zeros(torch.ones(1, 3, 0, dtype=torch.bool))
    assert zeros is not None
    assert zeros.along(0, 12) is None
    assert zeros.along(1, 3) is None
