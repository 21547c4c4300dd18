"""Regions without gradients, in inference mode or under autocast are regions of the result."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import demp_fx
from demp_fx.emit.module import source

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
Region = Callable[[nn.Module, Tensor], Any]


def as_tensor(x: Any) -> Tensor:
    """What symbolic tracing cannot take: the class of a proxy is no tensor."""
    if not issubclass(type(x), Tensor):
        raise TypeError("not a tensor")
    return x


class Teacher(nn.Module):
    """A branch inside a region and one outside; half of the channels of each are dead."""

    def __init__(self, region: Region, look: Callable[[Any], Any] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Linear(6, 16), nn.Linear(6, 16)
        self.head, self.region, self.look = nn.Linear(16, 3), region, look
        with torch.no_grad():
            for layer in (self.inside, self.outside):
                layer.weight[:8] = layer.bias[:8] = 0

    def forward(self, x: Tensor) -> Tensor:
        with self.region(self, x):
            h = self.inside(self.look(x)).relu()
        return self.head(self.outside(x).relu() + h)


def effects(module: nn.Module, training: bool) -> tuple[Any, ...]:
    """What a region is there for: dtypes, and which parameters get gradients."""
    module.train(training).zero_grad()
    y = module(X)
    y.sum().backward()
    return y.dtype, {name for name, p in module.named_parameters() if p.grad is not None}


REGIONS: dict[str, Region] = {
    "no_grad": lambda *_: torch.no_grad(),
    "enable_grad": lambda *_: torch.enable_grad(),
    "set_grad_enabled": lambda *_: torch.set_grad_enabled(False),
    "by_mode": lambda m, _: torch.set_grad_enabled(m.training),
    "inference_mode": lambda *_: torch.inference_mode(),
    "autocast": lambda *_: torch.autocast("cpu", torch.bfloat16),
    "autocast_by_mode": lambda m, _: torch.autocast("cpu", enabled=m.training),
    "of_a_device": lambda _, x: torch.autocast(x.device.type, enabled=False),
    "no_autocast": lambda *_: torch.autocast(device_type="cpu", enabled=False),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", REGIONS)
def test_gradients_and_dtypes_are_the_originals(name: str, training: bool) -> None:
    model = Teacher(REGIONS[name])
    result = demp_fx.compile(model, X)
    narrow = result.module
    assert result.report.opaque == {}
    for layer in ("inside", "outside"):
        assert narrow.get_submodule(layer).weight.shape == (8, 6)
    for module in (narrow, copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert effects(module, training) == effects(model, training)
        with torch.autocast("cpu", torch.bfloat16):
            assert effects(module, training) == effects(model, training)


@pytest.mark.parametrize("name", [n for n in REGIONS if "by_mode" not in n])
def test_gradients_and_dtypes_survive_torch_export(name: str) -> None:
    model = Teacher(REGIONS[name], as_tensor)
    narrow = demp_fx.compile(model, X).module
    assert narrow.meta["demp_fx"].exported
    for training in (False, True):
        assert effects(narrow, training) == effects(model, training)


def test_a_forward_that_is_decorated_as_a_whole() -> None:
    class Frozen(Teacher):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Half(Teacher):
        @torch.autocast("cpu", torch.bfloat16)
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    narrow = demp_fx.compile(Frozen(REGIONS["no_autocast"]), X).module
    assert not narrow(X).requires_grad
    narrow = demp_fx.compile(Half(REGIONS["no_grad"]), X).module
    assert narrow(X).dtype == torch.bfloat16


def test_a_region_is_a_with_block_in_code() -> None:
    narrow = demp_fx.compile(Teacher(REGIONS["autocast"]), X).module
    blocks = [line.strip() for line in source(narrow).splitlines() if " with torch" in line]
    assert blocks == ["with torch.amp.autocast_mode.autocast('cpu', torch.bfloat16):"]
    space: dict[str, Any] = {"__name__": "written", "__file__": __file__}
    exec(compile(source(narrow), "module.py", "exec"), space)
    written = space["model"]()
    written.load_state_dict(narrow.state_dict())
    torch.testing.assert_close(written(X), narrow(X), rtol=0, atol=0)
    compiled = torch.compile(narrow, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), narrow(X), rtol=0, atol=0)


@pytest.mark.parametrize("name", REGIONS)
def test_an_exception_leaves_the_region(name: str) -> None:
    narrow = demp_fx.compile(Teacher(REGIONS[name]), X).module
    with pytest.raises(RuntimeError):
        narrow(X[:, :5])
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_caller_without_gradients_stays_without() -> None:
    narrow = demp_fx.compile(Teacher(REGIONS["no_grad"]), X).module
    with torch.no_grad():
        assert not narrow(X).requires_grad
        assert not torch.is_grad_enabled()


def test_checkpointing_is_no_region() -> None:
    class Saves(Teacher):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.inside, x, use_reentrant=True))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        narrow = demp_fx.compile(Saves(REGIONS["no_grad"]), X).module
    assert "inside.weight" in effects(narrow, training=True)[1]


def test_a_region_in_which_nothing_happens_is_gone() -> None:
    class Sizes(Teacher):
        def forward(self, x: Tensor) -> Tensor:
            with self.region(self, x):
                wide = x.shape[-1] > 2
            return self.inside(x) if wide else x

    for name in REGIONS:
        assert "with" not in demp_fx.trace(Sizes(REGIONS[name]), X).code
        torch.testing.assert_close(
            demp_fx.trace(Sizes(REGIONS[name]), X)(X), Sizes(REGIONS[name])(X)
        )


def partly_in_a_region(h: Tensor) -> Tensor:
    with torch.no_grad():
        h = h.relu().view(-1, 2, 4)
    return h.transpose(1, 2)


def around_a_detach(h: Tensor) -> Tensor:
    return h.view(-1, 2, 4).detach().transpose(1, 2)


@pytest.mark.parametrize("move", [partly_in_a_region, around_a_detach])
def test_where_the_gradient_ends_on_the_way_movements_are_no_selection(
    move: Callable[[Tensor], Tensor],
) -> None:
    class Swaps(nn.Module):
        """Channels change places, and what comes before gets no gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(6, 8), nn.Linear(8, 3)
            with torch.no_grad():
                self.make.weight[[1, 2]] = self.make.bias[[1, 2]] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.read(move(self.make(x)).reshape(-1, 8))

    model = Swaps()
    narrow = demp_fx.compile(model, X).module
    torch.testing.assert_close(narrow(X), model(X))
    assert effects(narrow, training=True) == effects(model, training=True)
    assert effects(narrow, training=True)[1] == {"read.weight", "read.bias"}
