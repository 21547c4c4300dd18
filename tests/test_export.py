"""The second front end: what symbolic tracing cannot take is traced by torch.export, as well."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.cuts import Cuts
from demp_fx.emit.module import source
from demp_fx.errors import TraceError
from demp_fx.inputs import Inputs
from demp_fx.passes.calls import run
from demp_fx.passes.sides import difference
from demp_fx.passes.still import Still
from demp_fx.tracing.module import TracedModule
from tests.zoo.transformers_networks import HIDDEN, TRANSFORMERS, build, kill_hidden


def tensor(*size: int) -> Tensor:
    rng = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, dtype=torch.float64, generator=rng)


def checked(x: Any) -> Tensor:
    """What symbolic tracing cannot take: the class of a proxy is no tensor."""
    if not issubclass(type(x), Tensor):
        raise TypeError("not a tensor")
    return x


class Block(nn.Module):
    """Layers, functions that take flags, a region without gradients, a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(8, 6)
        self.tied = self.linear
        self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)
        self.out.bias.requires_grad_(False)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(F.relu(self.norm(self.linear(checked(x))))) * self.scale
        with torch.no_grad():
            shift = h.mean(0)
        h = F.dropout(h + shift + torch.tensor([0.5]), 0.25, self.training)
        return self.tied(self.out(h))


@pytest.fixture
def block() -> Block:
    return Block()


X = tensor(4, 6)


def traced(model: nn.Module, *inputs: Any, **named: Any) -> TracedModule:
    """The graph, which must have come from torch.export."""
    graph = demp_fx.trace(model, named or inputs)
    assert graph.meta["demp_fx"].exported
    return graph


def assert_same(graph: nn.Module, model: nn.Module, *inputs: Any, **named: Any) -> None:
    """The same function in both modes, dropout aside, and the same running statistics."""
    for training in (False, True):
        ours, theirs = copy.deepcopy(graph).train(training), copy.deepcopy(model).train(training)
        with Still():
            found, expected = ours(*inputs, **named), theirs(*inputs, **named)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


# --- what the graph is ---------------------------------------------------------------------------


def test_layers_are_layers_again_and_functions_are_aten(block: Block) -> None:
    nodes = list(traced(block, X).graph.nodes)
    called = [node.target for node in nodes if node.op == "call_module"]
    assert called == ["linear", "norm", "drop", "out", "linear"]
    assert torch.ops.aten.relu.default in [node.target for node in nodes]


def test_it_computes_what_the_model_does_in_both_modes_and_for_other_batches(block: Block) -> None:
    graph = traced(block, X)
    assert_same(graph, block, X)
    assert_same(graph, block, tensor(9, 6))


def test_names_ties_and_settings_are_the_models(block: Block) -> None:
    graph = traced(block, X)
    assert list(graph.state_dict()) == list(block.state_dict())
    assert dict(graph.named_parameters()) == dict(block.named_parameters())
    assert graph.get_submodule("tied") is graph.get_submodule("linear")
    assert [p.requires_grad for p in graph.parameters()] == [
        p.requires_grad for p in block.parameters()
    ]


def test_the_model_is_left_as_it_is(block: Block) -> None:
    block.norm.train()
    before, state = set(vars(block)), copy.deepcopy(block.state_dict())
    traced(block, X)
    assert set(vars(block)) == before
    assert [m.training for m in (block, block.linear, block.norm)] == [False, False, True]
    assert not block._forward_hooks
    torch.testing.assert_close(block.state_dict(), state)


def test_dropout_follows_train_and_eval(block: Block) -> None:
    graph = traced(block, X)
    flags = [n.target for n in graph.graph.nodes if str(n.target).endswith("training")]
    assert flags == ["training"]
    assert torch.equal(graph(X), graph(X))
    graph.train()
    assert not torch.equal(graph(X), graph(X))


def test_a_region_without_gradients_stays_one(block: Block) -> None:
    graph = traced(block, X).train()
    gradients = []
    for model in (graph, block.train()):
        model.zero_grad()
        with Still():
            model(X).square().sum().backward()
        gradients.append(block.linear.weight.grad)
    torch.testing.assert_close(*gradients)


def test_every_node_has_the_users_line(block: Block) -> None:
    lines = {node.meta["source"].rpartition(":")[0] for node in traced(block, X).graph.nodes}
    assert lines == {__file__}


def test_where_a_trace_came_from_is_noted(block: Block) -> None:
    notes = traced(block, X).meta["demp_fx"]
    assert notes.opaque == {}
    assert "not a tensor" in notes.exported
    assert __file__ in notes.exported


# --- what comes in and goes out ------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Result:
    value: Tensor
    missing: Tensor | None = None


torch.export.register_dataclass(Result, serialized_type_name="tests.Result")

OUTPUTS: dict[str, Any] = {
    "dict": lambda h: {"a": h, "b": [h * 2, None]},
    "ordered_dict": lambda h: OrderedDict(out=h, aux=h * 2),
    "tuple": lambda h: (h, (h + 1,)),
    "namedtuple": lambda h: Pair(h, h - 1),
}


class Returns(nn.Module):
    def __init__(self, form: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.form = nn.Linear(6, 4).double(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.linear(checked(x)))


@pytest.mark.parametrize("form", OUTPUTS)
def test_the_output_has_the_models_form(form: str) -> None:
    model = Returns(OUTPUTS[form])
    found, expected = traced(model, X)(X), model(X)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected)


def test_a_dataclass_comes_back_as_one() -> None:
    found = traced(Returns(Result), X)(X)
    assert isinstance(found, Result)
    assert found.missing is None
    torch.testing.assert_close(found.value, Returns(Result)(X).value)


def test_what_no_graph_can_return_is_left_out_and_noted() -> None:
    model = Returns(lambda h: {"a": h, "cache": object()})
    graph = traced(model, X)
    assert graph(X)["cache"] is None
    assert graph.meta["demp_fx"].baked == ["output['cache'] left out: nothing is known of a object"]


def checking(model: nn.Module) -> nn.Module:
    """The model with a forward that looks at its inputs as `checked` does."""
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **inputs: Any) -> Any:
        for value in (*args, *inputs.values()):
            assert value is None or checked(value) is value
        return kind.forward(self, *args, **inputs)

    model.__class__ = type("Checking", (kind,), {"forward": forward})
    return model


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_come_through_it_as_well(name: str) -> None:
    network = TRANSFORMERS[name]
    model = checking(build(network))
    kill_hidden(model, network, HIDDEN // 2)
    result = demp_fx.compile(model, network.example())
    assert result.module.meta["demp_fx"].exported
    assert result.report.params_after < result.report.params_before
    given = Inputs.of(network.example(batch=5, length=9))
    for training in (False, True):
        found, expected = (run(m, given, training) for m in (result.module, model))
        assert difference(expected, found) <= 1e-12


def test_arguments_come_in_whole() -> None:
    class Takes(Returns):
        def forward(self, pair: Any, *rest: Tensor, scale: float = 1.0, **more: Tensor) -> Tensor:
            h = self.linear(checked(pair["x"]) + pair["y"][0]) * scale
            return sum(rest, h) + more["last"]

    model = Takes(None)
    pair = {"x": X, "y": (X * 2,)}
    named = {"pair": pair, "scale": 3.0, "last": tensor(4, 4)}
    graph = traced(model, **named)
    assert [n.target for n in graph.graph.find_nodes(op="placeholder")] == ["pair", "scale", "last"]
    assert_same(graph, model, **named)


def test_arguments_by_place_have_names() -> None:
    class Takes(Returns):
        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            return self.linear(checked(x)) + rest[0] * rest[1]

    given = (X, X[:, :4], X[:, 2:])
    graph = traced(Takes(None), *given)
    assert [n.target for n in graph.graph.find_nodes(op="placeholder")] == ["x", "rest_0", "rest_1"]
    assert_same(graph, Takes(None), *given)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_of_any_size_goes_in(batch: int, block: Block) -> None:
    graph = traced(block, X[:batch])
    for size in (1, 2, 5):
        torch.testing.assert_close(graph(tensor(size, 6)), block(tensor(size, 6)))


def test_a_batch_size_that_the_forward_needs_is_noted() -> None:
    class Fixed(Returns):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(checked(x)).view(2, 2, 4)

    model = Fixed(None)
    graph = traced(model, X)
    torch.testing.assert_close(graph(X), model(X))
    assert any("fixed at the example's" in note for note in graph.meta["demp_fx"].baked)


def test_a_batch_size_that_a_loop_needs_is_the_examples_in_a_dict_too() -> None:
    class Loop(Returns):
        def forward(self, given: dict[str, Tensor]) -> Tensor:
            x = self.linear(checked(given["x"]))
            return torch.stack([x[k] * k for k in range(x.shape[0])])

    model, given = Loop(None), {"x": X}
    graph = traced(model, given)
    torch.testing.assert_close(graph(given), model(given))
    assert any("fixed at the example's" in note for note in graph.meta["demp_fx"].baked)


def test_a_mode_that_changes_more_than_flags_is_noted() -> None:
    class Heads(Returns):
        def forward(self, x: Tensor) -> Any:
            h = self.linear(checked(x))
            return (h, h * 2) if self.training else h

    model = Heads(None).eval()
    graph = traced(model, X)
    torch.testing.assert_close(graph(X), model(X))
    assert any("eval mode followed" in note for note in graph.meta["demp_fx"].baked)


def test_dtypes_that_the_forward_asks_for_follow_the_parameters() -> None:
    class Casts(Returns):
        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(checked(x))
            h = h.to(torch.float32).square().to(x.dtype)
            return h.masked_fill(h > 1, torch.finfo(h.dtype).min)

    model = Casts(None)
    graph = traced(model, X)
    assert_same(graph, model, X)
    assert_same(graph.float(), model.float(), X.float())


def test_constants_are_those_of_the_models_dtype() -> None:
    class Adds(Returns):
        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(checked(x))
            return h + torch.tensor(0.1, dtype=h.dtype)

    assert_same(traced(Adds(None), X), Adds(None), X)


def test_no_device_is_written_into_the_graph() -> None:
    class Makes(Returns):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(checked(x)) + torch.arange(4, device=x.device)

    graph = traced(Makes(None), X)
    arguments = [value for n in graph.graph.nodes for value in (*n.args, *n.kwargs.values())]
    assert not any(isinstance(value, torch.device) for value in arguments)


# --- when ----------------------------------------------------------------------------------------


def test_what_symbolic_tracing_takes_is_not_exported() -> None:
    assert demp_fx.trace(nn.Sequential(nn.Linear(6, 4)).double(), X).meta["demp_fx"].exported == ""


def test_a_model_that_would_be_mostly_opaque_is_exported(block: Block) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = block, nn.Linear(8, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = Wrapper().eval()
    graph = traced(model, X)
    assert "body" in graph.meta["demp_fx"].exported
    assert not graph.meta["demp_fx"].opaque
    assert_same(graph, model, X)


def test_where_both_fail_both_reasons_are_given() -> None:
    class Data(Returns):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(checked(x)) if float(x.sum()) > 0 else x

    with pytest.raises(TraceError) as caught:
        demp_fx.trace(Data(None), X)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "control flow depends on the values in a tensor" in message
    assert "Nor could torch.export take it" in message
    assert message.count(Path(__file__).name) == 2


def test_values_of_one_of_several_results_are_the_reason_in_words() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            low, high = x.chunk(2, 1)
            return low if high.max() > 0 else high

    with pytest.raises(TraceError, match="control flow depends on the values in a tensor"):
        demp_fx.trace(Split(), X)


# --- what becomes of it --------------------------------------------------------------------------


class Sized(nn.Module):
    """Linear - function - linear, with channels 1, 4 and 6 of eight dead."""

    def __init__(self, function: Any, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.make, self.read = nn.Linear(6, 8), nn.Linear(width, 3)
        with torch.no_grad():
            self.make.weight[[1, 4, 6]] = 0
            self.make.bias[[1, 4, 6]] = 0
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.function(self.make(checked(x))))


FUNCTIONS: dict[str, Any] = {
    "view": lambda h: F.relu(h).view(-1, 1, 8),
    "reshape": lambda h: h.reshape(h.shape[0], 1, 8).reshape(-1, 8),
    "expand": lambda h: h.unsqueeze(0).expand(2, -1, 8),
    "chunk": lambda h: torch.cat(h.chunk(2, -1), -1),
    "split": lambda h: torch.cat(h.split(4, -1), -1),
    "split_sizes": lambda h: torch.cat(h.split([2, 5, 1], -1), -1),
    "slices": lambda h: torch.cat([h[:, :3], h[:, 3:-2], h[:, -2:]], -1),
    "narrow": lambda h: torch.cat([h.narrow(1, 0, 5), h.narrow(1, 5, 3)], -1),
    "sum": lambda h: F.relu(h) + h * 2,
    "size_as_a_number": lambda h: h * h.shape[-1] ** -0.5,
    "state": lambda h: torch.zeros(h.shape[0], 8, dtype=h.dtype) + h,
    "ones": lambda h: h * torch.ones(h.shape[0], 8, dtype=h.dtype),
    "full": lambda h: h * torch.full((h.shape[0], 8), 0.5, dtype=h.dtype),
    "new_full": lambda h: h * h.new_full((h.shape[0], 8), 0.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dead_channels_are_cut_through_aten(name: str) -> None:
    model = Sized(FUNCTIONS[name])
    result = demp_fx.compile(model, X)
    narrow = result.module
    assert narrow.meta["demp_fx"].exported
    assert narrow.get_submodule("make").weight.shape == (5, 6)
    assert narrow.get_submodule("read").weight.shape == (3, 5)
    x = tensor(7, 6)
    torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-14)


class Messages(Sized):
    """Nodes of a graph hear of the others along those edges that are no loops."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.make(checked(x)).relu()
        edges = edges[:, edges[0] != edges[1]]
        weights = torch.cat([x.new_ones(edges.shape[1]), x.new_ones(x.shape[0])])
        edges = torch.cat([edges, torch.arange(x.shape[0]).expand(2, -1)], 1)
        sent = h[edges[0]] * weights.view(-1, 1)
        target = edges[1].view(-1, 1).expand_as(sent)
        return self.read(h.new_zeros(x.shape[0], 8).scatter_add_(0, target, sent))


@pytest.mark.parametrize("cuts", ["pays", "always"])
def test_how_many_numbers_a_mask_picks_follows_the_mask(cuts: Cuts) -> None:
    model, edges = Messages(None), torch.tensor([[0, 1, 2, 3, 1], [1, 1, 3, 0, 2]])
    narrow = demp_fx.compile(model, (X, edges), cuts=cuts).module
    assert narrow.get_submodule("make").weight.shape == (5, 6)
    x = tensor(7, 6)
    for edges in (torch.tensor([[6, 5, 4], [4, 4, 5]]), torch.tensor([[2], [2]])):
        torch.testing.assert_close(narrow(x, edges), model(x, edges), rtol=0, atol=1e-14)


class Packed(Sized):
    """Rows that a mask tells from padding are picked from a padded batch, and join the others."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.make(checked(x))
        padded = h.new_zeros(2, 4, 8).index_put((mask,), h)
        return self.read(padded.relu()[mask] + h)


def test_a_mask_is_taken_to_pick_all_that_there_is() -> None:
    model, mask = Packed(None), torch.ones(2, 4, dtype=torch.bool)
    narrow = demp_fx.compile(model, (tensor(8, 6), mask)).module
    x, mask[0, 2:] = tensor(6, 6), False
    torch.testing.assert_close(narrow(x, mask), model(x, mask), rtol=0, atol=1e-14)


class Loops(Sized):
    """As many loops are taken for granted as there are nodes."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        weights = self.make(checked(x)).sum(1)[edges[0]]
        return weights[edges[0] == edges[1]] + x[:, 0]


def test_it_is_said_where_only_numbers_tell_whether_sizes_fit() -> None:
    edges = torch.tensor([[0, 1, 2, 3, 1], [0, 1, 2, 3, 2]])
    with pytest.raises(demp_fx.errors.UsageError, match="how much a mask picks is not known"):
        demp_fx.compile(Loops(None), (X, edges))


def test_a_table_that_is_cropped_at_a_size_is_kept_whole() -> None:
    class Positions(Returns):
        def __init__(self) -> None:
            super().__init__(None)
            self.table = nn.Parameter(tensor(16, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return checked(ids).unsqueeze(-1) * self.table[: ids.shape[1]]

    model = Positions()
    ids = torch.ones(2, 5, dtype=torch.int64)
    narrow = demp_fx.compile(model, ids).module
    longer = torch.ones(3, 9, dtype=torch.int64)
    torch.testing.assert_close(narrow(longer), model(longer))


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    """What is left of a block whose inner channels 1, 4 and 6 are dead."""
    block = Block()
    block.tied = nn.Linear(6, 6).double()
    with torch.no_grad():
        block.norm.weight[[1, 4, 6]] = 0
        block.norm.bias[[1, 4, 6]] = -1
        block.scale[[1, 4, 6]] = 0
    return demp_fx.compile(block, X).module


def test_copies_and_pickles_are_the_same_module(narrow: nn.Module) -> None:
    for twin in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert_same(twin, narrow, X)
        assert list(twin.state_dict()) == list(narrow.state_dict())
        assert twin.meta["demp_fx"] == narrow.meta["demp_fx"]


def test_torch_compile_runs_it(narrow: nn.Module) -> None:
    torch.compiler.reset()
    compiled = torch.compile(narrow, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), narrow(X))


def test_it_is_written_as_plain_torch(narrow: nn.Module) -> None:
    text = source(narrow)
    space: dict[str, Any] = {"__name__": "written", "__file__": __file__}
    exec(compile(text, "module.py", "exec"), space)
    written = space["model"]()
    written.load_state_dict(narrow.state_dict())
    assert_same(written, narrow, X)
    assert "demp_fx" not in text.partition('"""')[2].partition('"""')[2]


def test_inputs_keep_their_form() -> None:
    assert demp_fx.trace(Sized(F.relu), {"x": X}).meta["example_inputs"].kwargs["x"].shape == (4, 6)
    assert isinstance(demp_fx.trace(Sized(F.relu), X).meta["example_inputs"], Inputs)


def test_what_torch_export_has_made_gets_narrower_in_the_mode_that_it_is_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        model[1].weight[:3] = model[1].bias[:3] = 0
    x = tensor(6, 4)
    exported = torch.export.export(model.eval(), (x,)).module()
    narrow = demp_fx.compile(exported, x).module
    assert narrow.get_parameter("0.weight").shape == (5, 4)
    torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=1e-12)
