"""Inputs, parameters, buffers and layers may have the names of methods."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.emit.module import source
from demp_fx.errors import TraceError

NAMES = ["mean", "size", "view", "reshape", "chunk", "split", "narrow", "select", "add", "shape"]


def half_dead(layer: nn.Conv2d) -> None:
    with torch.no_grad():
        layer.weight[:4] = 0
        layer.bias[:4] = 0


class Normalised(nn.Module):
    def __init__(self, name: str, *, trained: bool) -> None:
        super().__init__()
        self.name = name
        self.i, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        value = torch.rand(1, 3, 1, 1)
        if trained:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)
        half_dead(self.i)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.o(self.i(x - getattr(self, self.name)).relu())
        return result


class Layered(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.o = name, nn.Conv2d(8, 2, 1)
        layer = nn.Conv2d(3, 8, 1)
        self.add_module(name, layer)
        half_dead(layer)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.o(getattr(self, self.name)(x).relu())
        return result


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_method(name: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    for net in (Normalised(name, trained=True), Normalised(name, trained=False), Layered(name)):
        result = demp_fx.compile(net, x)
        assert result.module.get_submodule("o").weight.shape == (2, 4, 1, 1)


@pytest.mark.parametrize("name", ["code", "graph", "meta"])
@pytest.mark.parametrize("kind", ["layer", "buffer"])
def test_names_that_a_graph_module_needs_are_refused_by_name(name: str, kind: str) -> None:
    model = Layered(name) if kind == "layer" else Normalised(name, trained=False)
    with pytest.raises(TraceError, match=f"'{name}'.*give it another name"):
        demp_fx.compile(model, torch.randn(2, 3, 4, 4))


def test_names_that_python_has_taken() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 8)
            parts = {"class": nn.Linear(8, 3), "1x": nn.ModuleDict({"def": nn.Linear(8, 2)})}
            self.heads = nn.ModuleDict(parts)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.relu(self.stem(x))
            inner = self.heads["1x"]
            assert isinstance(inner, nn.ModuleDict)
            return self.heads["class"](x), inner["def"](x)

    torch.manual_seed(0)
    model, x = Heads().eval(), torch.randn(2, 4)
    with torch.no_grad():
        model.stem.weight[:3] = 0
        model.stem.bias[:3] = 0
    module = demp_fx.compile(model, x).module
    assert module.get_parameter("heads.class.weight").shape == (3, 5)
    space: dict[str, Any] = {"__name__": "module"}
    exec(source(module), space)
    written = space["model"]()
    written.load_state_dict(module.state_dict())
    for narrow in (module, copy.deepcopy(module), written):
        for a, b in zip(narrow(x), model(x), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_names_that_cannot_be_written_are_refused(name: str) -> None:
    heads = nn.ModuleDict({name: nn.Linear(4, 2)})
    with pytest.raises(TraceError, match="give it another"):
        demp_fx.trace(nn.Sequential(nn.Linear(4, 4), heads), torch.randn(2, 4))
