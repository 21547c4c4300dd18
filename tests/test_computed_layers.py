"""Layers of torch whose weight is computed before each call: weight and spectral normalisation, and
pruning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.ao.pruning._experimental.pruner import FakeStructuredSparsity
from torch.nn.utils import parametrizations, prune

import demp_fx
from demp_fx.emit.module import source

DEAD = [0, 2, 4]  # of eight channels


def weight_norm(layer: nn.Conv2d) -> nn.Module:
    with torch.no_grad():
        layer.weight[DEAD] = 1.0  # a length of zero has no direction
    normalised = parametrizations.weight_norm(layer)
    with torch.no_grad():
        normalised.get_parameter("parametrizations.weight.original0")[DEAD] = 0
    return normalised


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def old_weight_norm(layer: nn.Conv2d) -> nn.Module:
    normalised = nn.utils.weight_norm(layer)
    with torch.no_grad():
        normalised.get_parameter("weight_g")[DEAD] = 0
    return normalised


def pruned(layer: nn.Conv2d) -> nn.Module:
    mask = torch.ones_like(layer.weight)
    mask[DEAD] = 0
    return prune.custom_from_mask(layer, "weight", mask)


class Mask(nn.Module):
    """Filters that a pruner has switched off."""

    def __init__(self, off: list[int]) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool))
        self.get_buffer("mask")[off] = False

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.get_buffer("mask").reshape(-1, 1, 1, 1) * weight


def masked(layer: nn.Conv2d) -> nn.Module:
    return nn.utils.parametrize.register_parametrization(layer, "weight", Mask(DEAD))


def masked_by_torch(layer: nn.Conv2d) -> nn.Module:
    mask = torch.ones(8, dtype=torch.bool)
    mask[DEAD] = False
    torchs = FakeStructuredSparsity(mask)
    return nn.utils.parametrize.register_parametrization(layer, "weight", torchs)


WAYS: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    f.__name__: f for f in (weight_norm, old_weight_norm, pruned, masked, masked_by_torch)
}


def network(way: str) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
    for layer in layers:
        assert layer.bias is not None
        layer.bias.data[DEAD] = 0
    first, second = (WAYS[way](layer.double()) for layer in layers)
    head = nn.Linear(8, 2).double()
    return nn.Sequential(
        first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("way", WAYS)
def test_they_get_narrower_and_keep_their_parameters(way: str) -> None:
    net, x = network(way), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = demp_fx.compile(net, x)
    state = result.module.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert not result.report.opaque
    assert state["6.weight"].shape == (2, 5)
    assert {state["0.bias"].shape, state["2.bias"].shape} == {(5,)}
    y = torch.randn(3, 3, 10, 10, dtype=torch.float64)
    torch.testing.assert_close(result.module(y), net(y), rtol=1e-12, atol=1e-12)
    result.module(y).sum().backward()
    assert all(p.grad is not None for p in result.module.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("way", WAYS)
def test_they_are_written_as_files(way: str) -> None:
    net, x = network(way), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    module = demp_fx.compile(net, x).module
    namespace: dict[str, object] = {"__file__": "module.py"}
    exec(source(module), namespace)
    kind = namespace[type(module).__name__]
    assert isinstance(kind, type)
    written = kind()
    written.load_state_dict(module.state_dict())
    torch.testing.assert_close(written.double()(x), module(x))


SPECTRAL = {
    "conv": lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 3)),
    "several iterations": lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 3), n_power_iterations=3),
    "transposed": lambda: nn.utils.spectral_norm(nn.ConvTranspose2d(8, 8, 3)),
    "parametrized": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated")
@pytest.mark.parametrize("kind", SPECTRAL)
def test_a_spectral_norm_needs_all_weights_and_its_layer_does_not(kind: str) -> None:
    """The largest singular value is that of the whole weight; in train mode it is looked for."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(8)]
    for norm in norms:
        nn.init.uniform_(norm.weight)
        norm.weight.data[DEAD] = 0
    stem, layer = nn.Conv2d(3, 8, 3, bias=False), SPECTRAL[kind]()
    net = nn.Sequential(stem, norms[0], nn.ReLU(), layer, norms[1], nn.ReLU(), nn.Conv2d(8, 2, 1))
    net.double()
    result = demp_fx.compile(net, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    narrow = result.module
    assert not result.report.opaque
    assert narrow.get_parameter("0.weight").shape == (5, 3, 3, 3)
    assert narrow.get_parameter("6.weight").shape == (2, 5, 1, 1)
    for mode in (True, True, False, True):
        x = torch.randn(3, 3, 10, 10, dtype=torch.float64)
        net.train(mode)
        narrow.train(mode)
        torch.testing.assert_close(narrow(x), net(x), rtol=1e-10, atol=1e-10)
    state, before = narrow.state_dict(), net.state_dict()
    assert state.keys() == before.keys()
    for name in before:
        if name.endswith(("_u", "_v")):
            torch.testing.assert_close(state[name], before[name], rtol=1e-10, atol=1e-10)


def test_what_is_computed_in_another_way_in_each_mode_stays_whole() -> None:
    class Noisy(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2 if self.training else weight

    layer = nn.Linear(6, 8)
    nn.utils.parametrize.register_parametrization(layer, "weight", Noisy())
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 2)).double()
    result = demp_fx.compile(net, torch.randn(4, 6, dtype=torch.float64))
    assert "in another way in each mode" in result.report.opaque["0"]
    proof = result.report.verification
    assert proof is not None
    assert proof.train_error == 0


def test_inputs_that_a_pruner_has_switched_off_are_read_by_nobody() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()).double()
    prune.ln_structured(net[2], "weight", amount=0.5, n=1, dim=1)
    prune.ln_structured(net[2], "weight", amount=0.5, n=2, dim=0)
    net.append(nn.Conv2d(6, 2, 1).double())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    narrow = demp_fx.compile(net, x, cuts="always").module
    assert narrow.get_parameter("0.weight").shape == (4, 3, 1, 1)
    assert narrow.get_parameter("2.weight_orig").shape[1:] == (4, 3, 3)
    assert narrow.get_buffer("2.weight_mask").shape[1:] == (4, 3, 3)
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)
