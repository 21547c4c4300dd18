"""Several threads at once take turns, and what is around a call does not change its result."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

import demp_fx


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[0].bias[:5] = 0
    return model


def test_threads_may_compile_at_the_same_time() -> None:
    # made before: what other threads do with torch meanwhile is not waited for
    model, x, widths = network(), torch.randn(2, 4), list[int]()

    def work() -> None:
        for _ in range(3):
            result = demp_fx.compile(model, x)
            widths.append(result.module.get_parameter("0.weight").size(0))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert widths == [3] * 12
    assert torch.get_default_dtype() == torch.float32
    assert gc.isenabled()
    assert network()(x).shape == (2, 3)


MADE_ON: set[str] = set()


class Convolutions(nn.Module):
    """conv - norm - relu - conv; its own code makes a tensor on the default device."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.norm.weight[:4] = 0.1
            self.norm.bias[:4] = -50.0

    def forward(self, x: Tensor) -> Tensor:
        MADE_ON.add(torch.empty(1).device.type)
        return self.head(torch.relu(self.norm(self.conv(x))))


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "another default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("around", AROUND)
def test_what_the_caller_has_entered_does_not_matter(around: str) -> None:
    model, x = Convolutions(), torch.randn(4, 3, 6, 6)
    MADE_ON.clear()
    with AROUND[around]():
        result = demp_fx.compile(model.eval(), x, calibration=[x])
    assert ({"meta"} if around == "another default device" else {"cpu"}) <= MADE_ON
    with AROUND[around]():
        groups = demp_fx.analyze(demp_fx.trace(model, x)).groups
    assert result.module.get_parameter("conv.weight").shape == (4, 3, 3, 3)
    assert [group.size for group in groups] == [8, 3, 4]
    assert torch.allclose(result.module(x), model(x), atol=1e-5)
    result.module(x).sum().backward()


@pytest.mark.parametrize("around", AROUND)
def test_nor_does_it_for_a_demon(around: str) -> None:
    model, x = Convolutions(), torch.randn(4, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    recipe = demp_fx.Recipe(prune_every=2, span=4, prune_at_start=False)
    with AROUND[around]():
        demon = demp_fx.Demon(model, optimizer, x, recipe, [x])
    for _ in range(4):
        optimizer.zero_grad()
        demon.module(x).pow(2).mean().backward()
        optimizer.step()
        with AROUND[around]():
            demon.step()
    assert [event.failure for event in demon.events] == [None, None]
    assert demon.module.get_parameter("conv.weight").shape == (4, 3, 3, 3)
