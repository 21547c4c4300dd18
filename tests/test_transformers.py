"""Networks of transformers: traced in both modes, and narrower where MLP units are dead."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import demp_fx
from demp_fx.emit.module import source
from demp_fx.inputs import Inputs
from demp_fx.passes.calls import run
from demp_fx.passes.sides import difference
from demp_fx.tracing.module import TracedModule
from tests.zoo.transformers_networks import HIDDEN, TRANSFORMERS, build, hf, kill_hidden

ERROR = 1e-12  # relative, in float64
DEAD = 10

every = pytest.mark.parametrize("name", TRANSFORMERS)


@functools.cache
def traced(name: str) -> tuple[nn.Module, TracedModule]:
    network = TRANSFORMERS[name]
    model = build(network)
    return model, demp_fx.trace(model, network.example())


@functools.cache
def compiled(name: str) -> tuple[nn.Module, Any]:
    network = TRANSFORMERS[name]
    model = build(network)
    kill_hidden(model, network, DEAD)
    return model, demp_fx.compile(model, network.example())


def assert_same(ours: nn.Module, theirs: nn.Module, example: dict[str, Any]) -> None:
    inputs = Inputs.of(example)
    for training in (False, True):
        error = difference(run(theirs, inputs, training), run(ours, inputs, training))
        assert error <= ERROR, "train" if training else "eval"


@every
def test_its_modules_are_seen_through(name: str) -> None:
    notes = traced(name)[1].meta["demp_fx"]
    assert (notes.exported, notes.opaque) == ("", {})


def test_a_cache_of_keys_and_values_is_left_out_of_the_output() -> None:
    model, graph = traced("llama")
    inputs = TRANSFORMERS["llama"].example()
    assert model(**inputs).past_key_values is not None
    assert graph(**inputs).past_key_values is None
    [note] = [note for note in graph.meta["demp_fx"].baked if note.startswith("output")]
    assert "left out: nothing is known of a DynamicCache" in note


@every
def test_the_graph_computes_the_same_in_both_modes_at_other_sizes(name: str) -> None:
    model, graph = traced(name)
    assert_same(graph, model, TRANSFORMERS[name].example(batch=5, length=9))
    assert_same(graph, model, TRANSFORMERS[name].example(batch=1))


@every
def test_names_and_ties_are_kept(name: str) -> None:
    model, graph = traced(name)
    assert list(graph.state_dict()) == list(model.state_dict())
    assert dict(graph.named_parameters()) == dict(model.named_parameters())


@every
def test_every_dropout_works_in_train_mode_and_not_in_eval(name: str) -> None:
    """As many random numbers are drawn as the model itself draws."""
    model, graph = traced(name)
    inputs = TRANSFORMERS[name].example()

    def drawn(module: nn.Module, training: bool) -> torch.Tensor:
        module = copy.deepcopy(module).train(training)
        torch.manual_seed(0)
        with torch.no_grad():
            module(**inputs)
        return torch.rand(4)

    for training in (False, True):
        assert torch.equal(drawn(graph, training), drawn(model, training))


@every
def test_dead_hidden_units_are_cut_out_exactly(name: str) -> None:
    network = TRANSFORMERS[name]
    model, result = compiled(name)
    narrow, live = result.module, HIDDEN - DEAD

    assert_same(narrow, model, network.example(batch=5, length=9))
    assert list(narrow.state_dict()) == list(model.state_dict())
    old = dict(model.named_parameters())
    for key, weight in narrow.named_parameters():
        layer = key.rpartition(".")[0]
        if weight.dim() == 2 and "attention" not in layer:
            if layer.endswith(network.makes):
                assert sorted(weight.shape) == sorted((16, live * (1 + network.halves)))
            elif layer.endswith(network.reads):
                assert sorted(weight.shape) == sorted((16, live))
            else:
                assert weight.shape == old[key].shape
    assert result.report.params_after < result.report.params_before


@every
def test_copies_pickles_and_compiled_ones_are_the_same(name: str) -> None:
    narrow = compiled(name)[1].module
    example = TRANSFORMERS[name].example()
    for twin in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert_same(twin, narrow, example)
    torch.compiler.reset()
    fast = torch.compile(narrow, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert difference(narrow(**example), fast(**example)) <= ERROR


@every
def test_it_is_written_as_a_file(name: str) -> None:
    narrow = compiled(name)[1].module
    space: dict[str, Any] = {"__name__": "written", "__file__": __file__}
    exec(compile(source(narrow), "module.py", "exec"), space)
    written = space["model"]()
    written.load_state_dict(narrow.state_dict())
    assert_same(written, narrow, TRANSFORMERS[name].example(batch=3))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_models_that_compute_norms_in_float32_are_verified_in_float64(name: str) -> None:
    network = TRANSFORMERS[name]
    model = build(network).float()
    kill_hidden(model, network, DEAD)
    verified = demp_fx.compile(model, network.example()).report.verification
    assert verified is not None
    assert verified.eval_error <= ERROR
    assert verified.train_error <= ERROR


def test_the_users_line_is_the_models_not_torchs() -> None:
    sources = {node.meta["source"] for node in traced("llama")[1].graph.nodes}
    assert all("/transformers/" in line for line in sources)


def test_a_cache_is_left_out_of_the_output_and_noted() -> None:
    graph = traced("gpt2")[1]
    found = graph(**TRANSFORMERS["gpt2"].example())
    assert type(found).__name__ == "CausalLMOutputWithCrossAttentions"
    assert any("DynamicCache" in note for note in graph.meta["demp_fx"].baked)
    assert all(tensor is not None for tensor in found.values())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_eager_attention_and_padding_masks(name: str) -> None:
    network = TRANSFORMERS[name]
    model = build(network)
    model.set_attn_implementation("eager")  # type: ignore[operator]

    def masked(batch: int, length: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, -2:] = 0
        return {**network.example(batch, length), "attention_mask": mask}

    graph = demp_fx.trace(model, masked(2, 7))
    assert_same(graph, model, masked(3, 10))


def test_what_a_module_that_stays_whole_returns_by_name_is_read_by_place() -> None:
    class Drops(nn.Module):
        """Layers left out at random, as their numbers tell."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.inner(x) if torch.rand([]) < 2 else x
            return hf.modeling_outputs.BaseModelOutput(last_hidden_state=x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.drops, self.up, self.down = Drops(), nn.Linear(4, 8), nn.Linear(8, 3)
            with torch.no_grad():
                self.up.weight[:5] = self.up.bias[:5] = 0
            self.double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(self.drops(x)[0]).relu())

    net, x = Net(), torch.randn(2, 4).double()
    narrow = demp_fx.compile(net, x).module
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
    assert narrow.get_parameter("up.weight").shape == (3, 4)
