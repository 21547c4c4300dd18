"""Code that asks what it is given, before it does what it is there for: it gets tensors."""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import demp_fx


def insists(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"not a tensor: {type(x)}")
    return x * 2


def insists_on_one_of_several(x: Any) -> Tensor:
    assert isinstance(x, (int, Tensor))
    assert isinstance(x.T, Tensor)
    assert not isinstance(x, (int, nn.Parameter))
    assert not isinstance(x.shape, Tensor)
    return x * 2


def asks_torch(x: Any) -> Tensor:
    first = next(a for a in (3, None, x) if torch.is_tensor(a))
    return first * 2


def asks_torchscript(x: Any) -> Tensor:
    return x * 2 if torch.jit.isinstance(x, Tensor) else x


def takes_a_default(x: Any) -> Tensor:
    value = x() if callable(x) else x
    assert callable(x.view)
    return value.view(-1, 6) * 2


def looks_up_by_rank(x: Any) -> Tensor:
    return x * {1: 1, 2: 2}[x.ndim] * {2: 1}[x.dim()]


ASKS: list[Callable[[Any], Tensor]] = [
    insists, insists_on_one_of_several, asks_torch, asks_torchscript, takes_a_default,
    looks_up_by_rank,
]  # fmt: skip


class Asks(nn.Module):
    """A layer, and a function of what it gives; half of the channels are dead."""

    def __init__(self, function: Callable[[Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.make, self.read = nn.Linear(4, 6), nn.Linear(6, 3)
        with torch.no_grad():
            self.make.weight[::2] = 0
            self.make.bias[::2] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.function(self.make(x)))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("function", ASKS)
def test_a_proxy_is_what_it_stands_for(function: Callable[[Any], Tensor]) -> None:
    model = Asks(function)
    result = demp_fx.compile(model, X)
    notes = result.module.meta["demp_fx"]
    assert (notes.exported, notes.opaque, notes.baked) == ("", {}, [])
    assert result.module.get_parameter("read.weight").shape == (3, 3)
    torch.testing.assert_close(result.module(X), model(X), rtol=0, atol=1e-12)


def clamped(x: Tensor, value: float) -> Tensor:
    return (x / value).tanh() * value


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_function_that_torchscript_has_compiled_is_looked_through() -> None:
    compiled = torch.jit.script(clamped)
    model = Asks(lambda x: compiled(x, value=2.0))
    result = demp_fx.compile(model, X)
    assert result.report.opaque == {}
    assert result.module.get_parameter("read.weight").shape == (3, 3)
    torch.testing.assert_close(result.module(X), model(X), rtol=0, atol=1e-12)
    torch.testing.assert_close(compiled(X, 2.0), clamped(X, 2.0))


class Chosen(nn.Module):
    """What no graph can hold: it decides by the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 0).all()):
            return x
        return self.linear(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("compiled", [
    lambda: torch.jit.script(Chosen()),
    lambda: torch.jit.trace(nn.Linear(3, 3), torch.zeros(1, 3)),
])  # fmt: skip
def test_a_module_that_torchscript_has_compiled_stays_whole(compiled: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), compiled(),
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2),
    ).double()  # fmt: skip
    with torch.no_grad():
        for layer in (model[0], model[4]):
            layer.weight[:5] = layer.bias[:5] = 0
    result = demp_fx.compile(model, X)
    assert result.report.opaque.keys() == {"3"}
    assert [result.module.get_submodule(name).in_features for name in "26"] == [3, 3]
    torch.testing.assert_close(result.module(X), model(X), rtol=0, atol=1e-12)


def test_parameters_are_parameters_in_the_models_code() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.scale, nn.Parameter)
            return x * self.scale

    assert demp_fx.trace(Scale(), X).meta["demp_fx"].exported == ""


def test_tensors_made_on_the_device_of_the_parameters_are_known() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(1, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[0], device=next(self.parameters()).device).double()
            embedded = self.embed(places[:, None])
            insists(embedded)
            return x + embedded

    model = Positions()
    graph = demp_fx.trace(model, X)
    assert (graph.meta["demp_fx"].exported, graph.meta["demp_fx"].opaque) == ("", {})
    torch.testing.assert_close(graph(X[:3]), model(X[:3]), rtol=0, atol=0)


def summed(x: Tensor, y: Tensor) -> Tensor:
    """What works out its result from sizes that are plain numbers."""
    batch, tokens, width = tuple(int(size) for size in x.shape)
    numbers: Tensor = torch.reshape(x, (batch * tokens, width)) + y
    return numbers.reshape(batch, tokens, width)


def test_a_package_that_wants_plain_numbers_is_called_with_any_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package: Any = types.ModuleType("plain_sizes")
    package.summed = summed
    monkeypatch.setitem(sys.modules, "plain_sizes", package)
    monkeypatch.setattr(summed, "__module__", "plain_sizes")
    monkeypatch.setattr("demp_fx.tracing.tracer.PLAIN_SIZES", ("plain_sizes",))
    model = Asks(lambda x: package.summed(x, x[0, 0]))
    result = demp_fx.compile(model, X.view(1, 5, 4))
    assert not any("size in x.shape" in line for line in result.report.assumptions)
    assert result.module.get_parameter("read.weight").shape == (3, 3)
    x = torch.randn(3, 7, 4).double()
    torch.testing.assert_close(result.module(x), model(x), rtol=0, atol=1e-12)


@functools.lru_cache
def halved(shape: Any) -> list[Any]:
    return [shape[0], shape[1] // 2, 2]


def test_a_cache_of_shapes_does_not_keep_the_model() -> None:
    model: nn.Module | None = Asks(lambda x: x.view(halved(x.shape)).flatten(1))
    kept = weakref.ref(model)
    assert demp_fx.trace(model, X).meta["demp_fx"].opaque == {}
    assert halved.cache_info().currsize == 1
    model = None
    gc.collect()
    assert kept() is None


def test_code_that_asks_for_the_device_gets_the_models() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.make(x)
            kind = h.device.type
            result: Tensor = self.read(h.relu() if kind == "cpu" and not h.is_cuda else -h)
            return result

    model, x = Asks(), torch.randn(3, 6)
    torch.testing.assert_close(demp_fx.trace(model, x)(x), model(x))


@pytest.mark.parametrize("kind", [bool, int, float, complex])
def test_types_of_python_are_types_of_tensors(kind: Any) -> None:
    def function(x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[1], device=x.device, dtype=kind)
        return x * ones.to(kind).abs() if kind is not bool else x.masked_fill(~ones, 0)

    model = Asks(function)
    narrow = demp_fx.compile(model, X).module
    assert narrow.get_parameter("read.weight").shape == (3, 3)
    torch.testing.assert_close(narrow(X), model(X), rtol=1e-12, atol=1e-12)


OFFSETS = np.array([0, 3, 1])
WITH_ARRAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "new_tensor": lambda x: x * x.new_tensor(OFFSETS).sum(),
    "index": lambda x: x.flip(0)[OFFSETS],
    "operand": lambda x: torch.mul(x[:3], torch.as_tensor(OFFSETS, device=x.device).unsqueeze(1)),
}


@pytest.mark.parametrize("name", WITH_ARRAYS)
def test_arrays_of_numpy_are_numbers_in_the_code(name: str) -> None:
    model = Asks(WITH_ARRAYS[name])
    narrow = demp_fx.compile(model, X).module
    assert narrow.get_parameter("make.weight").shape == (3, 4)
    torch.testing.assert_close(narrow(X), model(X), rtol=1e-12, atol=1e-12)


COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "whole": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "part": lambda model: nn.Sequential(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
}


def in_place(*names: str) -> Callable[[nn.Module], nn.Module]:
    def compiled(model: nn.Module) -> nn.Module:
        for name in names:
            model.get_submodule(name).compile(backend="eager")
        return nn.Sequential(model)

    return compiled


COMPILED |= {"part, in place": in_place(""), "layers, in place": in_place("make", "read")}


# torch's own compiler looks at gradients in torch 2.14
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("way", COMPILED)
def test_what_torch_has_compiled_is_traced_as_it_is_written(way: str) -> None:
    model = COMPILED[way](Asks(lambda x: x.view(len(x), 2, 3).flip(1).flatten(1)))
    result = demp_fx.compile(model, X)
    notes = result.module.meta["demp_fx"]
    assert (notes.exported, notes.opaque) == ("", {})
    shapes = {name: p.shape for name, p in result.module.named_parameters()}
    assert shapes.keys() == dict(model.named_parameters()).keys()
    assert sorted(shapes.values()) == sorted([(3, 4), (3,), (3, 3), (3,)])
    torch.testing.assert_close(result.module(X), model(X), rtol=1e-12, atol=1e-12)
