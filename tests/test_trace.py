"""Tracing keeps what a model computes, in both modes, and everything about it that has a name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import numbers
import pickle
import subprocess
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import Variable
from torch.distributions import (
    AffineTransform,
    Categorical,
    Normal,
    TransformedDistribution,
    kl_divergence,
)
from torch.func import functional_call

import demp_fx
from demp_fx.emit.module import source
from demp_fx.errors import TraceError, UsageError
from demp_fx.inputs import Inputs
from demp_fx.trace import trace_graph
from demp_fx.tracing.module import TracedModule


def tensor(*size: int) -> Tensor:
    return torch.randn(
        *size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size))
    )


def targets(graph: TracedModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x)) * self.scale
        return F.dropout(x, 0.5, self.training)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.unused = nn.Linear(2, 2)
        self.tied = self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.blocks(x))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


X = tensor(6, 4)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.ends = nn.ModuleDict({"left": nn.Linear(4, 2), "right": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> list[Tensor]:
        for block in self.blocks:
            x = block(x)
        return [end(x) for end in self.ends.values()]


# --- names, hierarchy, modes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "twin", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)),
             lambda m: demp_fx.compile(m, X).module],
)  # fmt: skip
def test_parts_are_found_as_in_the_model(twin: Any) -> None:
    graph = twin(demp_fx.trace(Nested().double(), X))
    assert isinstance(graph.blocks[1][0], nn.Linear)
    assert isinstance(graph.blocks[-1][-1], nn.ReLU)
    assert [len(block) for block in graph.blocks] == [2, 2]
    assert graph.ends["right"].out_features == 3
    assert demp_fx.trace(nn.Sequential(nn.Linear(4, 2)).double(), X)[0].out_features == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
def test_torchscript_takes_what_is_handed_out() -> None:
    model = Nested().double()
    narrow = demp_fx.compile(model, X).module
    for a, b in zip(torch.jit.script(narrow)(X), model(X), strict=True):
        torch.testing.assert_close(a, b)


def test_names_and_order_of_the_state_dict_are_the_models(net: Net) -> None:
    graph = demp_fx.trace(net, X)
    assert list(graph.state_dict()) == list(net.state_dict())
    assert dict(graph.named_parameters()) == dict(net.named_parameters())
    assert list(dict(graph.named_buffers())) == list(dict(net.named_buffers()))


def test_what_a_module_does_not_save_is_not_saved() -> None:
    class Private(nn.Module):
        """Its table is made anew wherever it is loaded."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(4.0).double())

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {}

        def forward(self, x: Tensor) -> Tensor:
            return x * self.get_buffer("table")

    model = nn.Sequential(nn.Linear(4, 4), Private()).double()
    graph = demp_fx.trace(model, X)
    assert list(graph.state_dict()) == list(model.state_dict()) == ["0.weight", "0.bias"]
    assert list(copy.deepcopy(graph).state_dict()) == ["0.weight", "0.bias"]
    assert list(demp_fx.compile(model, X).module.state_dict()) == ["0.weight", "0.bias"]


def test_a_module_called_twice_has_one_name(net: Net) -> None:
    called = targets(demp_fx.trace(net, X))
    assert called.count("blocks.0.linear") == 2
    assert "tied.linear" not in called


def test_a_cache_that_the_forward_fills_is_not_touched() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.cache, self.seen = nn.Linear(4, 4).double(), {"old": 1}, [1]

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            self.last = self.cache["new"] = self.linear.weight * 2
            return x @ self.cache["new"]

    model = Caches()
    graph = demp_fx.trace(model, X)
    assert model.cache == {"old": 1}
    assert model.seen == [1]
    assert not hasattr(model, "last")
    torch.testing.assert_close(graph(X), model(X))


class Remembers(nn.Module):
    """Keeps averages in buffers, and a loss and a buffer of another shape in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        for name, shape in {"average": (8,), "calls": (), "last": (1,)}.items():
            self.register_buffer(name, torch.zeros(shape))
        with torch.no_grad():
            self.linear.weight[:4] = self.linear.bias[:4] = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).relu()
        self.average = 0.9 * self.average + 0.1 * h.mean(0)
        self.calls = self.calls + 1
        self.last = h
        self.loss = h.square().mean()
        return self.head(h - self.average)


def test_buffers_that_the_forward_assigns_are_written() -> None:
    model = Remembers().double()
    result = demp_fx.compile(model, X)
    narrow, kept = result.module, result.plan.keep["average"][0]
    assert (model.calls, narrow.calls) == (0, 0)
    for x in (X, X + 1):
        torch.testing.assert_close(narrow(x), model(x))
        torch.testing.assert_close(narrow.calls, model.calls)
        torch.testing.assert_close(narrow.average, model.average[kept])
        assert not model.average[[k for k in range(8) if k not in kept]].any()


def test_what_else_the_forward_assigns_is_noted() -> None:
    notes = demp_fx.trace(Remembers().double(), X).meta["demp_fx"].baked
    assert ["`last`" in note for note in notes] == [True, False]
    line = Remembers.forward.__code__.co_firstlineno + 5
    assert notes[1].startswith(
        f"{__file__}:{line}: `self.loss = h.square().mean()` computes `loss`"
    )


def test_what_a_module_that_stays_whole_assigns_needs_no_note() -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.size, self.total = x.shape, x.sum()
            return x if self.total > 0 else -x

    notes = demp_fx.trace(nn.Sequential(nn.Linear(4, 4).double(), Whole()), X).meta["demp_fx"]
    assert list(notes.opaque) == ["1"]
    assert notes.baked == []


def test_one_graph_follows_train_and_eval(net: Net) -> None:
    graph = demp_fx.trace(net, X)
    assert {"blocks.0.training", "blocks.1.training"} <= set(targets(graph))
    torch.testing.assert_close(graph(X), net(X), rtol=0, atol=0)
    graph.train()  # shares its layers with net, but not its blocks
    net.train()
    for module in (graph, net):
        torch.manual_seed(1)
        module.output = module(X)
    torch.testing.assert_close(graph.output, net.output, rtol=0, atol=1e-12)
    assert (graph.output == 0).any()


def test_modes_of_single_modules_are_kept(net: Net) -> None:
    net.train()
    net.blocks[1].eval()
    graph = demp_fx.trace(net, X)
    assert graph.training
    assert graph.get_submodule("blocks.0").training
    assert not graph.get_submodule("blocks.1").training


def test_the_model_is_left_as_it_was(net: Net) -> None:
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    demp_fx.trace(net, X)
    assert {name: dict(vars(module)) for name, module in net.named_modules()} == before
    with pytest.raises(UsageError):
        demp_fx.trace(net, (X, X))
    assert net.blocks[0].training is False


def test_tracing_runs_nothing_in_place() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x

    model = Counter()
    graph = demp_fx.trace(model, X)
    assert model.calls == 0
    graph(X)
    assert model.calls == 1


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 3), nn.BatchNorm1d(4), nn.Dropout(0.0), nn.MultiheadAttention(4, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_leaf_layer_as_the_whole_model(layer: nn.Module) -> None:
    layer = layer.double()
    inputs = (X, X, X) if isinstance(layer, nn.MultiheadAttention) else (X,)
    graph = demp_fx.trace(layer, inputs)
    assert list(graph.state_dict()) == list(layer.state_dict())
    for training in (False, True):
        layer.train(training)
        graph.train(training)
        torch.testing.assert_close(graph(*inputs), layer(*inputs))


def test_a_batch_norm_as_the_whole_model_counts_its_batches() -> None:
    graph = demp_fx.trace(nn.BatchNorm1d(4).double(), X)
    graph(X)
    graph.eval()(X)
    assert graph.get_buffer("num_batches_tracked") == 1


def test_containers_are_looked_through() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.list = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.dict = nn.ModuleDict({"relu": nn.ReLU(), "nothing": nn.Sequential()})
            self.weights = nn.ParameterList([torch.ones(4)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.list:
                x = self.dict["relu"](layer(x)) * self.weights[0]
            return self.dict["nothing"](x)

    model = Lists().double()
    graph = demp_fx.trace(model, X)
    assert {"list.0", "list.1", "dict.relu", "weights.0"} <= set(targets(graph))
    torch.testing.assert_close(graph(X), model(X), rtol=0, atol=0)


def test_every_node_knows_its_line(net: Net) -> None:
    for node in demp_fx.trace(net, X).graph.nodes:
        file, line = node.meta["source"].rsplit(":", 1)
        assert file.endswith(".py")
        assert int(line) > 0
    dropout = next(n for n in demp_fx.trace(net, X).graph.nodes if n.target is F.dropout)
    file, line = dropout.meta["source"].rsplit(":", 1)
    assert file == __file__
    code = Block.forward.__code__
    assert int(line) == code.co_firstlineno + 2


def test_attributes_may_be_called_self() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("self", nn.Linear(4, 4))
            self.inner = nn.Module()
            self.inner.register_parameter("self", nn.Parameter(torch.ones(4)))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("self")(x) * self.inner.self

    model = Named().double()
    narrow = demp_fx.compile(model, X).module
    for module in (narrow, copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        torch.testing.assert_close(module(X), model(X))
    space: dict[str, Any] = {"__name__": "written", "__file__": __file__}
    exec(source(narrow), space)
    space["model"]().load_state_dict(narrow.state_dict())


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_everything(net: Net, twin: Any) -> None:
    graph = demp_fx.trace(net, X)
    copied = twin(twin(graph))
    assert isinstance(copied, TracedModule)
    assert copied.meta["demp_fx"] == graph.meta["demp_fx"]
    assert list(copied.state_dict()) == list(graph.state_dict())
    names = [(n.name, n.meta["source"]) for n in graph.graph.nodes]
    assert [(n.name, n.meta["source"]) for n in copied.graph.nodes] == names
    torch.testing.assert_close(copied(X), net(X), rtol=0, atol=0)
    assert not torch.equal(copied.train()(X), copied(X))
    assert not net.training
    with torch.no_grad():
        copied.get_parameter("blocks.0.linear.weight").zero_()
    assert net.blocks[0].linear.weight.abs().sum() > 0


UNPICKLED: dict[str, Callable[[Tensor], Any]] = {
    "max": lambda x: F.max_pool1d(x, 2),
    "adaptive": lambda x: F.adaptive_max_pool1d(x, 2),
    "with indices": lambda x: F.max_pool1d(x, 2, return_indices=True)[0],
    "an ATen op": lambda x: torch.ops.aten.max_pool1d.default(x, [2]),
    "a memory format": lambda x: x.contiguous(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("name", UNPICKLED)
def test_what_does_not_pickle_itself_is_found_again(name: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return UNPICKLED[name](x)

    graph = demp_fx.trace(Model(), X)
    for protocol in (2, pickle.DEFAULT_PROTOCOL):  # torch.save's, and pickle's
        assert torch.equal(pickle.loads(pickle.dumps(graph, protocol))(X), UNPICKLED[name](X))


def test_a_traced_module_compiles(net: Net) -> None:
    compiled = torch.compile(demp_fx.trace(net, X), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), net(X), rtol=0, atol=0)


@pytest.mark.parametrize(
    "use",
    [
        lambda module, x: module(x),
        lambda module, x: module.forward(x),
        lambda module, x: type(module).forward(module, x),
        lambda module, x: copy.deepcopy(module)(x),
        lambda module, x: pickle.loads(pickle.dumps(module))(x),
        lambda module, x: fx.symbolic_trace(module)(x),
        lambda module, x: demp_fx.trace(module, x)(x),
    ],
)
def test_the_code_of_a_draft_is_there_when_asked_for(net: Net, use: Any) -> None:
    x = tensor(3, 4)
    module = trace_graph(net, x)
    assert not isinstance(vars(type(module))["forward"], types.FunctionType)
    torch.testing.assert_close(use(module, x), net(x))
    assert trace_graph(net, x).code == demp_fx.trace(net, x).code


def test_nobody_is_handed_a_draft(net: Net) -> None:
    x = tensor(3, 4)
    for module in (demp_fx.trace(net, x), demp_fx.compile(net, x).module):
        assert isinstance(vars(type(module))["forward"], types.FunctionType)


@pytest.mark.parametrize("count", [2, 255, 256, 600])
def test_a_value_is_unpacked_into_as_many_names_as_there_are(count: int) -> None:
    names = ", ".join(f"a{i}" for i in range(count))
    space: dict[str, Any] = {"nn": nn}
    exec(f"def forward(self, x):\n    {names} = x\n    return a0 - a{count - 1}", space)
    model = type("Unpacks", (nn.Module,), {"forward": space["forward"]})()
    x = tensor(count, 3)
    torch.testing.assert_close(demp_fx.trace(model, x)(x), x[0] - x[-1])


def test_constants_are_buffers_that_are_not_saved() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.ones(4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift + torch.arange(4)

    model = Shifted()
    graph = demp_fx.trace(model, X)
    for module in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert not module.state_dict()
        torch.testing.assert_close(module(X), model(X), rtol=0, atol=0)


def test_a_graph_module_is_traced_anew(net: Net) -> None:
    first = demp_fx.trace(net, X)
    second = demp_fx.trace(first, X)
    assert [n.name for n in second.graph.nodes] == [n.name for n in first.graph.nodes]
    torch.testing.assert_close(second(X), net(X), rtol=0, atol=0)
    plain = demp_fx.trace(fx.symbolic_trace(nn.Sequential(nn.Linear(4, 2))).double(), X)
    assert "0" in targets(plain)


# --- example inputs ------------------------------------------------------------------------------


class Options(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return x * scale if y is None else (x + y) * scale


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (X, ["x"]),
        ((X,), ["x"]),
        ([X, X], ["x", "y"]),
        ({"y": X, "x": X}, ["x", "y"]),
        ({"x": X, "scale": 3.0}, ["x", "scale"]),
    ],
)
def test_arguments_that_are_not_given_vanish(inputs: Any, names: list[str]) -> None:
    graph = demp_fx.trace(Options(), inputs)
    assert [n.target for n in graph.graph.find_nodes(op="placeholder")] == names
    given = Inputs.of(inputs)
    expected = Options()(*given.args, **given.kwargs)
    torch.testing.assert_close(graph(*given.args, **given.kwargs), expected, rtol=0, atol=0)
    assert torch._assert not in targets(graph)


def test_an_argument_without_tensors_is_fixed() -> None:
    graph = demp_fx.trace(Options(), {"x": X, "scale": 3.0})
    assert graph.meta["demp_fx"].baked == ["argument `scale` fixed at 3.0"]
    torch.testing.assert_close(graph(x=X, scale=9.0), 3 * X)


def test_starred_arguments_get_names_of_their_own() -> None:
    class Starred(nn.Module):
        def forward(self, x: Tensor, *more: Tensor, last: Tensor, **named: Tensor) -> Tensor:
            return x + sum(more) + last + named["extra"]

    graph = demp_fx.trace(Starred(), Inputs((X, X, X), {"last": X, "extra": X}))
    torch.testing.assert_close(graph(X, X, X, last=X, extra=X), 5 * X)


def test_nested_inputs_and_outputs() -> None:
    class Nested(nn.Module):
        def forward(self, pair: Any) -> dict[str, Any]:
            first, second = pair["a"]
            return {"sum": first + second, "all": [first, (second, None)]}

    inputs = {"pair": {"a": (X, X)}}
    out = demp_fx.trace(Nested(), inputs)(**inputs)
    torch.testing.assert_close(out, {"sum": 2 * X, "all": [X, (X, None)]})


@dataclasses.dataclass
class Result:
    logits: Tensor
    hidden: Tensor | None = None
    calls: int = dataclasses.field(default=0, init=False)


@pytest.mark.parametrize(
    "form", [lambda x: Result(x, x + 1), lambda x: OrderedDict(out=x, aux=x + 1)]
)
def test_an_output_keeps_its_class_and_the_graph_knows_its_tensors(form: Any) -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Any:
            return form(self.linear(x))

    graph = demp_fx.trace(Returns(), X)
    assert type(graph(X)) is type(form(X))
    [result] = graph.graph.output_node().all_input_nodes
    assert [node.name for node in result.all_input_nodes] == ["linear", "add"]
    if type(form(X)) is OrderedDict:  # a class of this test is in no file's reach
        assert "from collections import OrderedDict" in source(graph)


@pytest.mark.parametrize(
    ("inputs", "named"), [({"x": X, "z": X}, "'z'"), ({"y": X}, "'x'"), ((X, X, 1, 2), "too many")]
)
def test_arguments_that_do_not_fit_are_named(inputs: Any, named: str) -> None:
    with pytest.raises(UsageError, match=f"Options.forward.*{named}"):
        demp_fx.trace(Options(), inputs)


# --- control flow --------------------------------------------------------------------------------


def test_a_branch_on_training_is_followed_and_noted() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return x + 1
            return x - 1

    graph = demp_fx.trace(Branches().eval(), X)
    torch.testing.assert_close(graph(X), X - 1)
    assert "training" not in targets(graph)
    line = Branches.forward.__code__.co_firstlineno + 1
    note = f"{__file__}:{line}: `if self.training:` followed for eval mode"
    assert graph.meta["demp_fx"].baked == [note]


ASKED: dict[str, Callable[[Tensor], bool]] = {
    "sizes": lambda x: x.shape[0] > 1,
    "dtype": lambda x: x.dtype in (torch.float16, torch.bfloat16),
    "device": lambda x: x.device.type == "mps",
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_note_says_what_a_branch_was_on(asked: str) -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if ASKED[asked](x) else x - 1

    (note,) = demp_fx.trace(Asks(), X).meta["demp_fx"].baked
    assert note.endswith(f"followed for the example inputs' {asked}")


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "negative base": lambda x: x * (-1) ** torch.arange(x.shape[-1], device=x.device),
    "negative fraction": lambda x: x * (-0.5) ** x.shape[0],
    "rounded": lambda x: x[: round(x.shape[0] * 0.6)] * round(x.shape[0] / 3, 1),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_are_what_python_makes_of_them(number: str) -> None:
    class Computes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = NUMBERS[number](x)
            return result

    model = Computes()
    graph = demp_fx.trace(model, tensor(3, 4))
    for size in (3, 5, 8):
        x = tensor(size, 4)
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=1e-15)


@pytest.mark.parametrize("mode", [False, True], ids=["traced-in-eval", "traced-in-training"])
def test_a_number_chosen_by_training_follows_train_and_eval(mode: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.scale(x)
            rate = 0.4 if self.training else 0.0
            return F.scaled_dot_product_attention(x, x, x, dropout_p=rate).flatten(
                1 if self.training else -2
            )

    model = Attention().double().train(mode)
    graph = demp_fx.trace(model, tensor(2, 3, 4))
    assert graph.meta["demp_fx"].baked == []
    for training in (True, False):
        model.train(training)
        graph.train(training)
        torch.manual_seed(0)
        expected = model(tensor(5, 3, 4))
        torch.manual_seed(0)
        torch.testing.assert_close(graph(tensor(5, 3, 4)), expected, rtol=0, atol=0)


def test_a_tensor_that_is_an_attribute_is_sliced_as_long_as_the_input() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.randn(9, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            self.table = self.table.to(x.device)
            return x + self.table[: x.size(1)]

    model = nn.Sequential(Places(), Places())
    graph = demp_fx.trace(model, tensor(2, 5, 4))
    assert graph.meta["demp_fx"].opaque == {}
    for size in (5, 8):
        x = tensor(3, size, 4)
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


def test_what_forward_keeps_on_its_modules_is_no_proxy_afterwards() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table: Tensor | None = None
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(x.shape[1]).to(x)
            if "double" not in self.cache:
                self.cache["double"] = self.table * 2
            return x + self.table + self.cache["double"]

    model = nn.Sequential(Lazy())
    graph = demp_fx.trace(model, X)
    assert (model[0].table, model[0].cache) == (None, {})
    torch.testing.assert_close(graph(X), model(X), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(X), model(X), rtol=0, atol=0)


def test_sizes_steer_python_as_they_do_in_eager() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            assert x.ndim == 4
            y = self.conv(x)
            if y.shape[-1] % 2:
                y = F.pad(y, (0, 1))
            batch, *_rest = y.shape
            y = y + torch.zeros(batch, len(y.shape) + 2, 1, 1, device=y.device)
            for i in range(y.size(-1) // 2):
                y[..., 2 * i] = 0
            return y

    model, x = Sized().double(), tensor(2, 3, 7, 7)
    graph = demp_fx.trace(model, x)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(graph(x[:1]), model(x[:1]), rtol=0, atol=1e-12)
    assert any("if y.shape[-1] % 2" in note for note in graph.meta["demp_fx"].baked)


MAKES: dict[str, Any] = {
    "tensor": lambda x: x * torch.tensor([2.0], dtype=x.dtype),
    "full": lambda x: x + torch.full((x.shape[0], 1), 1.0, dtype=x.dtype),
    "arange": lambda x: x + (torch.arange(x.shape[0])[:, None] > 1),
    "ones": lambda x: x * torch.ones(4, dtype=x.dtype, device=x.device),
}


@pytest.mark.parametrize("name", MAKES)
def test_a_dtype_is_known_behind_tensors_that_the_code_makes(name: str) -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = MAKES[name](x)
            return x if x.dtype == torch.float64 else x.double()

    torch.testing.assert_close(demp_fx.trace(Asks(), X)(X), Asks()(X))


def test_the_type_of_another_tensor_is_followed() -> None:
    class Typed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[-1]).type(x.type())

    graph = demp_fx.trace(Typed(), X)
    assert not graph.meta["demp_fx"].exported
    for x in (X, X.float()):
        torch.testing.assert_close(graph(x), Typed()(x), rtol=0, atol=0)
    narrow = demp_fx.compile(Typed(), X).module
    torch.testing.assert_close(narrow(X), Typed()(X), rtol=0, atol=0)


def test_tracing_leaves_torchs_lists_of_its_functions_as_they_are() -> None:
    code = """if True:
        import torch, demp_fx

        class Makes(torch.nn.Module):
            def forward(self, x):
                x = torch.distributions.Normal(x, 1.0).rsample()
                return x + torch.ones(4) if x.dim() == 2 else x

        demp_fx.trace(Makes(), torch.ones(3, 4))
        with torch.device("meta"):
            print(torch.ones(3).device, torch.overrides.resolve_name(torch.relu))
        compiled = torch.compile(lambda x: x.relu() + torch.narrow(x, 0, 0, 1), fullgraph=True,
                                 backend="eager")
        print(compiled(torch.ones(2)).tolist())
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "meta torch.relu\n[2.0, 2.0]\n"


def test_limits_of_a_dtype_follow_the_dtype() -> None:
    class Masks(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            x = x.masked_fill(x > 1, torch.finfo(x.dtype).min)
            return x + (ids == torch.iinfo(ids.dtype).max)

    graph = demp_fx.trace(Masks(), (X, X.long()))
    assert not graph.meta["demp_fx"].exported
    for inputs in ((X, X.long()), (X.float(), X.int())):
        torch.testing.assert_close(graph(*inputs), Masks()(*inputs), rtol=0, atol=0)


def test_numbers_of_numpy_are_numbers() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.clamp(x * np.log(2), max=np.float32(0.5)).flatten(np.int64(1))

    graph = demp_fx.trace(Scaled(), X)
    torch.testing.assert_close(graph(X), Scaled()(X), rtol=0, atol=0)
    assert "np" not in graph.code


def test_checks_that_the_example_passes_are_passed_over() -> None:
    class Checked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            fits = x.shape[0] * 4 == x.numel()
            torch._check_value(fits() if callable(fits) else fits, lambda: "not of width 4")
            torch._check_tensor_all(x.isfinite(), lambda: "not finite")
            return x.view(-1, 2)

    graph = demp_fx.trace(Checked(), X)
    assert not graph.meta["demp_fx"].exported
    torch.testing.assert_close(graph(X), Checked()(X), rtol=0, atol=0)
    with pytest.raises(ValueError, match="width"):
        torch._check_value(False, lambda: "not of width 4")


def test_what_a_compiler_is_told_of_a_tensor_is_not_in_the_graph() -> None:
    class Marks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros_like(x)
            torch._dynamo.mark_static_address(state)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            return x + state

    graph = demp_fx.trace(Marks(), X)
    assert not graph.meta["demp_fx"].exported
    assert [n.name for n in graph.graph.nodes] == ["x", "zeros_like", "add", "output"]


def test_code_may_ask_how_the_device_of_its_input_casts() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_autocast_enabled(x.device.type):
                return x.to(torch.get_autocast_dtype(x.device.type))
            return x * 2

    graph = demp_fx.trace(Casts(), X)
    assert not graph.meta["demp_fx"].exported
    assert [n.name for n in graph.graph.nodes] == ["x", "mul", "output"]


def test_an_identity_of_nothing_is_nothing() -> None:
    class Attends(nn.Module):
        """To what else it is given, or else to itself."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            other = self.norm(other)
            return x @ (x if other is None else other).mT

    graph = demp_fx.trace(Attends(), X)
    torch.testing.assert_close(graph(X), Attends()(X), rtol=0, atol=0)


SIZES: dict[str, Any] = {
    "len": lambda x: x.new_ones(1, 4).expand(len(x), -1),
    "int": lambda x: x.reshape(int(x.shape[0]), 2, 2),
    "a quotient": lambda x: x.view(int(x.shape[0] * 4 / (4 * 2 / 2)), 2, -1),
    "checked": lambda x: x.view(int(x.size(0)), -1) if isinstance(x.size(0), int) else x.view(-1),
    "plain": lambda x: x * int("3") + len([1, 2]) + int(2.5) + int("11", base=2) + len(x.shape),
    "types": lambda x: x * isinstance(3, int) * [int].count(type(len(""))) * issubclass(bool, int),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_batch_size_that_is_made_a_number_stays_one_of_any_batch(name: str) -> None:
    class Tail(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return SIZES[name](x)

    graph = demp_fx.trace(Tail(), X)
    assert not graph.meta["demp_fx"].exported
    for x in (X, tensor(9, 4)):
        torch.testing.assert_close(graph(x), Tail()(x))
    assert not {"len", "int"} & globals().keys()


ELSEWHERE = types.ModuleType("helpers_of_a_model")
exec(
    "def back(windows, height):\n"
    "    images = int(windows.shape[0] / (height / 2))\n"
    "    return windows.view(images, height, -1)",
    vars(ELSEWHERE),
)
back = ELSEWHERE.back


def test_helpers_from_another_file_get_sizes_of_any_batch() -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return back(x.view(-1, 2, 1), 4)

    graph = demp_fx.trace(Windows(), X)
    for x in (X, tensor(9, 4)):
        torch.testing.assert_close(graph(x), Windows()(x))
    assert not {"len", "int"} & vars(ELSEWHERE).keys()


def swapped(x: Tensor) -> Tensor:
    order = torch.cat((torch.tensor([1, 0], device=x.device), torch.arange(2, x.ndim)))
    return x.unsqueeze(2).permute(*order, 2).contiguous()


def as_many(x: Tensor) -> Tensor:
    counts = torch.tensor([2, 3], device=x.device)
    for _ in range(int(counts.sum())):
        x = x * 2
    return x


@pytest.mark.parametrize("compute", [swapped, as_many])
def test_numbers_in_tensors_that_nothing_goes_into_are_known(
    compute: Callable[[Tensor], Tensor],
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return compute(self.a(x)).flatten(1).sum(1)

    net = Net().double()
    graph = demp_fx.trace(net, X)
    assert not graph.meta["demp_fx"].exported
    assert not graph.meta["demp_fx"].opaque
    for x in (X, tensor(9, 4)):
        torch.testing.assert_close(graph(x), net(x))
    torch.testing.assert_close(demp_fx.compile(net, X).module(X), net(X))


def test_a_batch_size_stays_one_in_functions_of_other_files(monkeypatch: Any) -> None:
    helpers = types.ModuleType(f"{__name__.partition('.')[0]}.helpers")
    exec("def ones(x): return x.new_ones(1, 4).expand(len(x), -1)", vars(helpers))
    monkeypatch.setitem(globals(), "ones", vars(helpers)["ones"])

    class Tail(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return globals()["ones"](x)  # type: ignore[no-any-return]

    graph = demp_fx.trace(Tail(), X)
    assert graph(tensor(9, 4)).shape == (9, 4)
    assert "len" not in vars(helpers)


class Asked(nn.Module):
    """Finds out by trying whether its parts take lengths."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            try:
                x = part(x, lengths=None)
            except TypeError:
                x = part(x)
        return x


def test_layers_refuse_arguments_that_they_do_not_take() -> None:
    model = Asked(nn.Linear(4, 8), Outer(nn.Tanh()), nn.Linear(8, 4)).double()
    graph = demp_fx.trace(model, X)
    assert graph.meta["demp_fx"].opaque == {}
    torch.testing.assert_close(graph(X), model(X), rtol=0, atol=0)


def test_nobody_looks_at_shapes_that_are_not_used() -> None:
    class Mixes(nn.Module):
        """A value that nobody reads has the shape of blocks only because there are two samples."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            last = h[:, -1:]
            last.reshape(2 * last.shape[1], last.shape[0], 4)
            return self.b(h)

    model, x = Mixes().double(), tensor(2, 5, 4)
    narrow = demp_fx.compile(model, x).module
    x = tensor(3, 5, 4)
    torch.testing.assert_close(narrow(x), model(x), rtol=0, atol=0)


NUMPY: dict[str, Any] = {
    "a number": lambda x: x / np.sqrt(2.0) + np.sqrt(3.0) * x - np.float32(0.5),
    "an index": lambda x: x[:, : np.int64(2)].sum(np.int64(1)),
    "sizes": lambda x: x * 2 if (np.array(x.shape[1:]) % 2 == 0).all() else x,
    "a size": lambda x: x.new_ones(int(np.ceil(x.shape[1] / 3))),
}


@pytest.mark.parametrize("name", NUMPY)
def test_numpy_gets_sizes_and_gives_numbers(name: str) -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return NUMPY[name](x)

    graph = demp_fx.trace(Counts(), X)
    assert not graph.meta["demp_fx"].exported
    assert "np." not in source(graph)
    torch.testing.assert_close(graph(X), Counts()(X))


NAMED: dict[str, Any] = {
    "linear": lambda net, x: F.linear(input=x, weight=net.layer.weight, bias=net.layer.bias),
    "layer": lambda net, x: net.layer(input=x),
    "norm": lambda net, x: F.layer_norm(input=net.layer(x), normalized_shape=(4,)),
    "attention": lambda net, x: F.scaled_dot_product_attention(
        value=x[None], query=net.layer(x)[None], key=x[None], is_causal=True
    ),
    "where": lambda net, x: torch.where(input=x, condition=x > 0, other=net.layer(x)),
    "cat": lambda net, x: torch.cat(dim=1, tensors=(net.layer(x), x)),
    "overloads": lambda net, x: x[torch.arange(start=1, end=x.shape[0])],
    "only some": lambda net, x: torch.softmax(net.layer(x), dim=1),
}


@pytest.mark.parametrize("name", NAMED)
def test_arguments_given_by_name_are_in_their_places(name: str) -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return NAMED[name](self, x)

    model = Names().double()
    graph = demp_fx.trace(model, X)
    torch.testing.assert_close(graph(X), model(X), rtol=0, atol=0)
    calls = [n for n in graph.graph.nodes if n.op in ("call_function", "call_module")]
    assert all(n.args for n in calls)
    assert not any(isinstance(v, fx.Node) for n in calls for v in n.kwargs.values())


def test_a_slice_may_end_at_a_number_in_a_tensor_that_is_computed_of_sizes() -> None:
    class Resampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            length = torch.ceil(torch.as_tensor(2 * x.shape[-1] / 3)).long()
            x = self.out(self.layer(x)[..., :length])
            return x[..., 1:] if x.shape[-1] % 2 else x

    model = Resampled().double()
    graph = demp_fx.trace(model, tensor(2, 1, 12))
    assert not graph.meta["demp_fx"].exported
    for size in (12, 18, 24):
        x = tensor(3, 1, size)
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


def test_sizes_are_numbers_to_the_packages_of_python() -> None:
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(x.shape[0], numbers.Integral)
            assert not isinstance(x, numbers.Number)
            self.share = Fraction(x.shape[0], 4)
            return self.layer(x)

    model = Segments().double()
    graph = demp_fx.trace(model, X)
    assert not graph.meta["demp_fx"].exported
    torch.testing.assert_close(graph(X[:2]), model(X[:2]), rtol=0, atol=0)


def test_items_that_are_none_are_none_to_the_code() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, parts: dict[str, Any]) -> Tensor:
            past, x = parts["past"], self.layer(parts["x"])
            if past is not None:
                x = x + self.of_the_past(past)
            return x if parts.get("mask") is None else x * parts["mask"]

    model = Parts().double()
    inputs = {"x": X, "past": None}
    graph = demp_fx.trace(model, (inputs,))
    assert not graph.meta["demp_fx"].exported
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["layer"]
    torch.testing.assert_close(graph(inputs), model(inputs), rtol=0, atol=0)


def test_arguments_may_have_the_names_that_fx_gives_a_module() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, mod: Tensor) -> Tensor:
            return self.layer(x) * mod

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, mod=x.sigmoid())

    model = Caller().double()
    graph = demp_fx.trace(model, X)
    assert "inner.layer" in targets(graph)
    assert not graph.meta["demp_fx"].exported
    torch.testing.assert_close(graph(X), model(X), rtol=0, atol=0)


def test_wrapped_functions_are_looked_through_where_possible() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return traceable(x) + untraceable(x)

    graph = demp_fx.trace(Wrapped(), X)
    assert untraceable in targets(graph)
    assert traceable not in targets(graph)
    torch.testing.assert_close(graph(X), Wrapped()(X), rtol=0, atol=0)


def test_wrapped_functions_may_return_several_values() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y, rank = with_rank(x)
            window, shift = sizes(y.shape[-1], [2, 1])
            return y.roll(shift, -1) * rank + window[0]

    graph = demp_fx.trace(Wrapped(), X)
    assert with_rank not in targets(graph)
    assert sizes not in targets(graph)
    torch.testing.assert_close(graph(X), Wrapped()(X), rtol=0, atol=0)


@fx.wrap
def with_rank(x: Tensor) -> tuple[Tensor, int]:
    return x + 1, x.dim()


@fx.wrap
def sizes(width: int, window: list[int]) -> tuple[list[int], int]:
    if width > 2:
        window[0] = width
    return window, window[1]


@fx.wrap
def traceable(x: Tensor) -> Tensor:
    return x * 2 if x.ndim == 2 else x


@fx.wrap
def untraceable(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def test_modules_that_the_forward_makes_are_functions() -> None:
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("weight", torch.rand(4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = nn.Sequential(nn.ReLU(), nn.Softmax(dim=1))(self.linear(x))
            return nn.CrossEntropyLoss(self.weight)(x, y) + nn.Dropout(0.0)(x).sum()

    model = Makes().double().eval()
    inputs = X, torch.arange(6) % 4
    graph = demp_fx.trace(model, inputs)
    assert not graph.meta["demp_fx"].exported
    torch.testing.assert_close(graph(*inputs), model(*inputs))


# --- what cannot be traced -----------------------------------------------------------------------


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.sum() > 0:
            return y
        return -y


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape
        return self.inner(x).reshape(width) + 1


def test_an_untraceable_submodule_stays_whole() -> None:
    model = Outer(DataDependent()).double().eval()
    graph = demp_fx.trace(model, X)
    reason = graph.meta["demp_fx"].opaque["inner"]
    line = DataDependent.forward.__code__.co_firstlineno + 2
    assert reason.endswith(f"at {__file__}:{line}")
    assert "inner" in targets(graph)
    assert "inner.linear" not in targets(graph)  # the attempt left nothing behind
    assert list(graph.state_dict()) == list(model.state_dict())
    for x in (X, -X):
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    assert graph.train().get_submodule("inner").training


class Reads(nn.Module):
    """Takes numbers out of a tensor: to multiply all with one, or to choose some rows."""

    def __init__(self, some: bool) -> None:
        super().__init__()
        self.some = some

    def forward(self, x: Tensor) -> Tensor:
        return x[: int((x > 0).sum().item()) // 4 + 1] if self.some else x * x.max().item()


class Reshapes(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(4, 4).double(), inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.layer(x))
        return x.view(*x.shape[:-1], 2, 2) + x.dim()


def test_sizes_are_known_behind_a_submodule_that_stays_whole() -> None:
    model = Reshapes(Reads(some=False))
    graph = demp_fx.trace(model, X)
    assert list(graph.meta["demp_fx"].opaque) == ["inner"]
    torch.testing.assert_close(graph(X), model(X), rtol=0, atol=0)


def test_sizes_that_depend_on_numbers_are_not_known() -> None:
    with pytest.raises(TraceError, match="depends on the values in a tensor"):
        demp_fx.trace(Reshapes(Reads(some=True)), X)


READS: dict[str, Any] = {
    "item": lambda x: x * x.abs().max().item(),
    "tolist": lambda x: x + x.mean().tolist(),
    "numpy": lambda x: x + x.mean().numpy().item(),
    "one_hot": lambda x: F.one_hot((x > 0).long()) * x.unsqueeze(-1),
    "repeat_interleave": lambda x: x.repeat_interleave((x[:, 0] > 0) + 1, 0),
    "vmap": lambda x: torch.vmap(lambda row: row * 2)(x),
}


class Tail(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", READS)
def test_a_submodule_that_reads_numbers_stays_whole_and_a_model_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4).double(), Tail(READS[name]))
    model.requires_grad_(False)
    narrow = demp_fx.compile(model, X).module
    assert list(narrow.meta["demp_fx"].opaque) == ["1"]
    torch.testing.assert_close(narrow(X), model(X))
    if name == "vmap":  # which torch.export takes in some releases
        return
    with pytest.raises(TraceError, match="Move these lines into a submodule"):
        demp_fx.trace(Tail(READS[name]), X)


PAIRS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "causal": lambda groups, b, q, k: k <= q,
    "window": lambda groups, b, q, k: q.new_ones((), dtype=torch.bool) & (abs(q - k) < 2),
    "groups": lambda groups, b, q, k: (groups[b, q] == groups[b, k]) | (k == 0),
    "lengths": lambda groups, b, q, k: k <= groups.amax(1)[b] + (groups * 0).sum(),
}


class Pairs(nn.Module):
    """Which token attends to which is said of two of them, and mapped over all."""

    def __init__(self, attends: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.out, self.attends = nn.Linear(4, 8), nn.Linear(8, 4), attends

    def forward(self, x: Tensor, groups: Tensor) -> Tensor:
        attends: Any = functools.partial(self.attends, groups)
        for dims in (None, None, 0), (None, 0, None), (0, None, None):
            attends = torch.vmap(attends, in_dims=dims)
        many, length = x.shape[:2]
        mask = attends(torch.arange(many), torch.arange(length), torch.arange(length))
        x = self.make(x)
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        result: Tensor = self.out(x)
        return result


def skip_unless_it_runs(model: nn.Module, *inputs: Tensor) -> None:
    """Older releases of torch take no index that is mapped over."""
    try:
        model(*inputs)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_function_of_two_tokens_is_mapped_over_all(pairs: str) -> None:
    model = Pairs(PAIRS[pairs]).double()
    skip_unless_it_runs(model, torch.randn(1, 2, 4).double(), torch.zeros(1, 2).long())
    graph = demp_fx.trace(model, (torch.randn(2, 5, 4).double(), torch.arange(10).view(2, 5) // 2))
    assert not graph.meta["demp_fx"].exported
    x, groups = torch.randn(3, 6, 4).double(), torch.arange(18).view(3, 6) // 3 % 5
    torch.testing.assert_close(graph(x, groups), model(x, groups), rtol=0, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        lambda groups, b, q, k: groups[b].amax() >= k,  # takes all of a row
        lambda groups, b, q, k: (groups.amax(0) > q + k).any(),
        lambda groups, b, q, k: torch.stack([q, k]).amax() > b,
    ],
)
def test_what_a_function_does_to_several_numbers_is_not_mapped(other: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Within(Pairs(other))).double()
    skip_unless_it_runs(model, torch.randn(2, 5, 4).double())
    graph = demp_fx.trace(model, torch.randn(2, 5, 4).double())
    assert graph.meta["demp_fx"].exported or list(graph.meta["demp_fx"].opaque) == ["1.pairs"]
    x = torch.randn(2, 5, 4).double()
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


class Within(nn.Module):
    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.pairs(x, (x[..., 0] > 0).long())
        return result


class Steps(nn.Module):
    """Keeps its stride in a buffer, and goes by it."""

    def __init__(self, persistent: bool = False, counts: str = "") -> None:
        super().__init__()
        self.layer, self.counts = nn.Linear(4, 4), counts
        self.register_buffer("stride", torch.tensor(2), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.counts == "before":
            self.stride.add_(1)
        behind = torch.ceil(x.shape[1] / self.stride).long() * self.stride - x.shape[1]
        if max(behind, self.stride) > 2:
            x = x.flip(1)
        x = F.pad(x, (0, 0, 0, behind))
        if self.counts == "after":
            self.stride += 1
        result: Tensor = self.layer(x[:, 1:] if x.shape[1] > 6 else x)
        return result


def test_whole_numbers_in_buffers_that_no_checkpoint_has_are_the_codes() -> None:
    model = Steps().double()
    graph = demp_fx.trace(model, torch.randn(2, 7, 4).double())
    notes = graph.meta["demp_fx"]
    assert not notes.exported
    assert any("if max(behind, self.stride) > 2" in note for note in notes.baked)
    for length in (7, 8, 11):
        x = torch.randn(3, length, 4).double()
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("how", [{"persistent": True}, {"counts": "before"}, {"counts": "after"}])
def test_what_a_checkpoint_or_the_code_changes_is_data(how: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match=r"depends on the values|and changed"):
        demp_fx.trace(Steps(**how).double(), torch.randn(2, 7, 4).double())


@pytest.mark.parametrize("listed", [False, True])
def test_tensors_of_the_code_take_sizes_of_the_input(listed: bool) -> None:
    class Placed(nn.Module):
        """Positions that are in no buffer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            table = torch.randn(1, 12, 4, dtype=torch.float64)
            self.tables = [table] if listed else table

        def forward(self, x: Tensor) -> Tensor:
            table = self.tables[0] if listed else self.tables
            table = table.narrow(1, 0, x.shape[1])
            result: Tensor = self.layer(x) + table.expand(x.shape[0], -1, -1)
            return result

    model = Placed().double()
    graph = demp_fx.trace(model, torch.randn(2, 5, 4).double())
    assert not graph.meta["demp_fx"].exported
    x = torch.randn(3, 7, 4).double()
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


def test_sizes_that_are_given_need_no_numbers() -> None:
    def sized(x: Tensor) -> Tensor:
        repeats = torch.tensor([1, 2] * 3)
        x = F.one_hot((x > 0).long(), 3) * x.repeat_interleave(2, 1)[:, :4].unsqueeze(-1)
        return x.repeat_interleave(repeats, 0, output_size=9)

    graph = demp_fx.trace(Tail(sized), X)
    assert not graph.meta["demp_fx"].exported
    torch.testing.assert_close(graph(X), sized(X))


SAMPLES: dict[str, Any] = {
    "log_prob": lambda x: Normal(x, x.exp()).log_prob(x + 1),
    "rsample": lambda x: Normal(x, x.exp()).rsample(),
    "samples": lambda x: Normal(x, x.exp()).rsample((3,)),
    "entropy": lambda x: Categorical(logits=x).entropy(),
    "divergence": lambda x: kl_divergence(Normal(x, x.exp()), Normal(x * 0, x * 0 + 1)),
    "transformed": lambda x: TransformedDistribution(
        Normal(x, x.exp()), [AffineTransform(x.mean(1, keepdim=True), 2.0)]
    ).log_prob(x),
}


def test_a_variable_is_the_tensor_that_it_is_made_of() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("index", torch.tensor([3, 1, 5, 0, 4, 2]))
            with torch.no_grad():
                self.make.weight[:2] = 0
                self.make.bias[:2] = 0

        def forward(self, x: Tensor) -> Tensor:
            made = Variable(self.make(x), requires_grad=True)
            return self.read(made.index_select(1, Variable(self.index)))

    model = Picks().double()
    result = demp_fx.compile(model, X)
    assert result.module.get_parameter("make.weight").shape[0] == 4
    assert "__new__" not in vars(Variable)
    torch.testing.assert_close(result.module(X), model(X))


@pytest.mark.parametrize("name", SAMPLES)
def test_distributions_are_looked_through(name: str) -> None:
    graph = demp_fx.trace(Tail(SAMPLES[name]), X)
    assert not graph.meta["demp_fx"].exported
    for x in (X, tensor(9, 4)):
        torch.manual_seed(0)
        expected = SAMPLES[name](x)
        torch.manual_seed(0)
        torch.testing.assert_close(graph(x), expected)


def test_what_an_attempt_looked_up_can_be_used_after_it() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, size: Any) -> Tensor:
            return x.reshape(size) if x.sum() > 0 else x

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given, self.shift = Given(), nn.Parameter(torch.ones(4).double())

        def forward(self, x: Tensor) -> Tensor:
            size = x.shape
            return self.given(x, size).reshape(size) + self.shift

    graph = demp_fx.trace(Uses(), X)
    graph.graph.lint()
    torch.testing.assert_close(graph(X), X + 1)


def test_an_untraceable_root_is_an_error_with_a_line() -> None:
    line = DataDependent.forward.__code__.co_firstlineno + 2
    with pytest.raises(TraceError, match=rf"test_trace.py:{line}: DataDependent .*submodule"):
        demp_fx.trace(DataDependent().double(), X)


def test_arguments_no_graph_can_hold_are_the_callers_problem() -> None:
    class Callback(nn.Module):
        def forward(self, x: Tensor, function: Any) -> Tensor:
            return function(x) if x.sum() > 0 else x

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.callback = Callback()

        def forward(self, x: Tensor) -> Tensor:
            return self.callback(x, object())

    graph = demp_fx.trace(Outer(Calls()), X)
    assert list(graph.meta["demp_fx"].opaque) == ["inner"]


def test_a_tensor_computed_from_parameters_aside_is_refused() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + sum(p.sum() for p in self.parameters())

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Aside()).double()
    assert "2" in demp_fx.trace(model, X).meta["demp_fx"].opaque


@pytest.mark.parametrize("when", ["forward_pre_hook", "forward_hook"])
def test_layers_with_hooks_of_their_own_stay_whole(when: str) -> None:
    model = Outer(nn.Linear(4, 4).double())
    getattr(model.inner, f"register_{when}")(lambda *_: None)
    graph = demp_fx.trace(model, X)
    assert list(graph.meta["demp_fx"].opaque) == ["inner"]
    assert list(graph.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(graph(X), model(X), rtol=0, atol=0)


def test_hooks_of_traced_modules_are_traced() -> None:
    model = Outer(Options())
    model.inner.register_forward_hook(lambda module, args, output: 2 * output)
    model.register_forward_hook(lambda module, args, output: 3 * output)
    torch.testing.assert_close(demp_fx.trace(model, X)(X), 3 * (2 * X + 1))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    "index", [[slice(1), slice(2)], [..., slice(1, 3)], [[0, 1], [1, 3]], [1, 0, 1]]
)
def test_a_list_is_an_index_of_several_dims_or_picks_along_one(index: list[Any]) -> None:
    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)[index]  # type: ignore[operator, no-any-return]

    model = Picks()
    model.a = nn.Linear(4, 8).double()
    x = torch.randn(3, 4).double()
    narrow = demp_fx.compile(model, x).module
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


class Lent(nn.Module):
    """One network, with the parameters of another, or with such as are computed."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.own, self.others = (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)) for _ in range(2))
        self.computed = computed

    def forward(self, x: Tensor) -> Tensor:
        given = dict(self.others.named_parameters())
        if self.computed:
            given = {name: 2 * p for name, p in given.items()}
        result: Tensor = functional_call(self.own, given, (x,))
        return result


@pytest.mark.parametrize("computed", [False, True])
def test_layers_compute_with_what_they_are_lent(computed: bool) -> None:
    model, x = Lent(computed).double(), torch.randn(5, 4).double()
    with torch.no_grad():
        model.others[0].weight[0] = 0
    graph = demp_fx.trace(model, x)
    assert bool(graph.meta["demp_fx"].exported) == computed
    torch.testing.assert_close(graph(x), model(x), rtol=1e-12, atol=1e-12)
    narrow = demp_fx.compile(model, x).module
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_layer_may_have_no_parameters_but_those_that_it_is_lent() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.layer = nn.Parameter(torch.randn(8, 4)), nn.Linear(4, 8, bias=False)
            del self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            self.layer.register_parameter("weight", self._parameters["weight"])
            x = self.layer(x)
            del self.layer.weight
            return x

    model, x = Empty(), X.float()
    torch.testing.assert_close(demp_fx.trace(model, x)(x), x @ model.weight.mT)


def test_a_module_that_cannot_be_looked_into_is_not_called_without_what_it_is_lent() -> None:
    model, x = nn.Sequential(nn.Linear(4, 99), nn.Linear(99, 4), Lent(computed=True)), X.float()
    graph = demp_fx.trace(model, x)
    assert list(graph.meta["demp_fx"].opaque) == ["2"]
    torch.testing.assert_close(graph(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("kind", ["backward_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_what_has_backward_hooks_stays_whole_and_runs_them(kind: str) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x))

    ran: list[nn.Module] = []
    model = Outer(Inner().double())
    for module in (model, model.inner, model.inner.a):
        getattr(module, f"register_{kind}")(lambda module, *_: ran.append(module))
    graph = demp_fx.trace(model, X)
    assert graph.meta["demp_fx"].opaque["inner"].startswith("backward hooks")
    assert "backward hooks of the model itself left out" in graph.meta["demp_fx"].baked
    graph(X.clone().requires_grad_()).sum().backward()
    assert sorted(type(module).__name__ for module in ran) == ["Inner", "Linear"]


def test_what_is_no_module_is_refused() -> None:
    function: Any = torch.relu
    with pytest.raises(UsageError, match="has to be"):
        demp_fx.compile(function, X)


def test_wrappers_and_unfinished_models_are_refused_with_advice() -> None:
    with pytest.raises(UsageError, match=r"\.module"):
        demp_fx.trace(nn.DataParallel(nn.Linear(4, 4)), X)
    with pytest.raises(UsageError, match=r"0\.weight.*run the model once"):
        demp_fx.trace(nn.Sequential(nn.LazyLinear(4)), X)
    with pytest.raises(TraceError, match="TorchScript"):
        demp_fx.trace(scripted(), X)


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(4, 4).eval())


# --- others' models ------------------------------------------------------------------------------

MODELS = {
    "resnet18": {},
    "vit_b_16": {"image_size": 64},
    "swin_t": {},
    "googlenet": {"init_weights": False, "aux_logits": False, "dropout": 0.0},
    "efficientnet_b0": {"dropout": 0.0},
}


@pytest.mark.parametrize("name", MODELS)
def test_torchvision_models_equal_eager_in_both_modes(name: str) -> None:
    torchvision = pytest.importorskip("tests.zoo.shim").torchvision
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **MODELS[name]).double().eval()
    x = tensor(2, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    graph = demp_fx.trace(model, x)
    assert not graph.meta["demp_fx"].opaque
    assert list(graph.state_dict()) == list(model.state_dict())
    graph = copy.deepcopy(graph)
    for training in (False, True):
        model.train(training)
        graph.train(training)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), model(x), rtol=1e-10, atol=1e-12)


def test_parts_of_a_sequential_are_looked_through() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))
            self.head = nn.ModuleList([nn.Dropout(), nn.Linear(5, 2)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[2:](self.layers[:2](x).relu())
            result: Tensor = nn.Sequential(*self.head)(x)
            return result

    model, x = Parts().eval(), torch.randn(3, 4)
    graph = demp_fx.trace(model, x)
    assert graph.meta["demp_fx"].exported == ""
    assert list(graph.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(graph.eval()(x), model(x))
    called = [n.target for n in graph.graph.nodes if n.op == "call_module"]
    assert called == ["layers.0", "layers.1", "layers.2", "head.0", "head.1"]
