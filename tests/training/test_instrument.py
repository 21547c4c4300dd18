"""Inserted nodes: anyone sees them, exemptions keep them out, and strip leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import redirect_stdout

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.passes.instrument import instrument
from demp_fx.passes.neurons import neurons
from demp_fx.passes.strip import strip
from demp_fx.recipe import Recipe
from examples.resnet import resnet18
from examples.vit import vit_digits
from tests.training.nets import Plain, Residual, batch


def example() -> Tensor:
    return batch(0)[0]


def inserted(module: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if str(n.target).startswith("demp.")]


def test_they_stand_in_the_table_of_the_graph() -> None:
    module = instrument(demp_fx.trace(Plain(), example()), Recipe())
    with redirect_stdout(io.StringIO()) as text:
        for node in module.graph.nodes:
            print(node.op, node.name, node.target)
    assert inserted(module) == [
        "demp.strength",
        "demp.bn1_penalty", "demp.act_noise", "demp.act_watch",
        "demp.bn2_penalty", "demp.act_1_noise", "demp.act_1_watch",
    ]  # fmt: skip
    assert "call_module demp_act_noise demp.act_noise" in text.getvalue()


@pytest.mark.parametrize("build", [Plain, Residual])
def test_strip_leaves_no_trace(build: type[nn.Module]) -> None:
    graph = demp_fx.trace(build(), example())
    clean = strip(instrument(graph, Recipe()))
    assert clean.code == graph.code
    assert [n for n, _ in clean.named_modules()] == [n for n, _ in graph.named_modules()]
    assert [n for n, _ in clean.named_buffers()] == [n for n, _ in graph.named_buffers()]
    assert clean.meta == graph.meta
    for (a, x), (b, y) in zip(clean.state_dict().items(), graph.state_dict().items(), strict=True):
        assert a == b
        assert x is y or torch.equal(x, y)


def test_the_state_dict_has_the_keys_of_the_model() -> None:
    module = instrument(demp_fx.trace(Plain(), example()), Recipe())
    assert list(module.state_dict()) == list(Plain().state_dict())
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in Plain().named_parameters()]


def test_copies_and_pickles_work() -> None:
    module = instrument(demp_fx.trace(Plain(), example()), Recipe())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert inserted(other) == inserted(module)
        out = other(example())
        assert torch.equal(out, module(example()))
        out.sum().backward()
        probe = other.get_submodule("demp.act_noise").get_buffer("probe")
        assert bool((probe.grad > 0).any())


def test_layers_are_exempt_by_pattern() -> None:
    graph = demp_fx.trace(Residual(), example())
    only = inserted(instrument(graph, Recipe(exempt=["block?.*", "hidden"])))
    assert only == ["demp.strength", "demp.norm_penalty", "demp.relu_noise", "demp.relu_watch"]
    some = inserted(instrument(graph, Recipe(only=["block1.conv1", "block1.bn1"])))
    assert some == [
        "demp.strength", "demp.block1_bn1_penalty", "demp.relu_1_noise", "demp.relu_1_watch",
    ]  # fmt: skip


def test_the_penalty_is_on_scales_or_on_weights() -> None:
    graph = demp_fx.trace(Residual(), example())
    scales = [f"demp.{n}_penalty" for n in
              ("norm", "block1_bn1", "block1_bn2", "block2_bn1", "block2_bn2")]  # fmt: skip

    def on(kind: str) -> list[str]:
        found = inserted(instrument(graph, Recipe(penalise=kind)))
        return [n for n in found if n.endswith("penalty")]

    assert on("scales") == scales
    assert on("auto") == [*scales, "demp.hidden_penalty"]
    assert set(on("weights")) == {
        f"demp.{n}_penalty"
        for n in ("stem", "block1_conv1", "block1_conv2", "block2_conv1", "block2_conv2",
                  "block2_skip", "hidden")
    }  # fmt: skip


def test_neurons_end_in_one_activation_each() -> None:
    """Identity skips are not grouped over the stage: every block has neurons of its own."""
    found = {n.node: sorted(p.parameter for p in n.parts)
             for n in neurons(demp_fx.trace(Residual(), example()))}  # fmt: skip
    norm = ["bias", "weight"]
    assert found == {
        "relu": sorted(["stem.weight", *(f"norm.{k}" for k in norm)]),
        "relu_1": sorted(["block1.conv1.weight", *(f"block1.bn1.{k}" for k in norm)]),
        "relu_2": sorted(["block1.conv2.weight", *(f"block1.bn2.{k}" for k in norm)]),
        "relu_3": sorted(["block2.conv1.weight", *(f"block2.bn1.{k}" for k in norm)]),
        "relu_4": sorted(["block2.conv2.weight", "block2.skip.weight",
                          *(f"block2.bn2.{k}" for k in norm)]),
        "relu_5": ["hidden.bias", "hidden.weight"],
    }  # fmt: skip


def test_hidden_units_of_a_transformer_are_neurons_and_tokens_are_not() -> None:
    model = vit_digits()
    found = neurons(demp_fx.trace(model, torch.randn(2, 1, 8, 8)))
    assert [(n.dim, n.width) for n in found] == [(2, 128), (2, 128)]
    assert [[p.parameter for p in n.parts] for n in found] == [
        [f"layers.{k}.up.weight", f"layers.{k}.up.bias"] for k in range(2)
    ]


def test_the_papers_resnet18_has_3904_neurons() -> None:
    found = neurons(demp_fx.trace(resnet18(), torch.randn(2, 3, 32, 32)))
    assert sum(n.width for n in found) == 3904


def test_logits_are_no_neurons() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    (layer,) = neurons(demp_fx.trace(model, torch.randn(2, 4)))
    assert {p.parameter for p in layer.parts} == {"0.weight", "0.bias"}


def test_a_parameter_used_without_a_module_is_penalised_too() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.linear(x, self.lin.weight)
            return self.head(torch.relu(x))

    module = instrument(demp_fx.trace(Bare(), torch.randn(2, 4)), Recipe(penalise="weights"))
    with torch.no_grad():
        module.get_buffer("demp.strength").fill_(0.5)
    x = torch.zeros(3, 4)
    module(x).sum().backward()
    weight = module.get_parameter("lin.weight")
    assert torch.equal(weight.grad, 0.5 * weight.detach().sign())


def test_what_others_read_is_not_copied_away() -> None:
    """An in-place activation changes its input for other readers: it gets no noise node."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y = torch.relu_(x)
            return (x + y).mean((2, 3))

    graph = demp_fx.trace(Shared(), example().float())
    module = instrument(graph, Recipe(penalty=0))
    assert inserted(module) in ([], ["demp.relu__watch"])
    assert torch.equal(module(example().float()), graph(example().float()))
