"""The death test equals the paper's definition, computed here with hooks on the original model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from demp_fx.errors import UsageError
from demp_fx.nodes.watch import Watch
from demp_fx.passes.instrument import instrument
from demp_fx.recipe import Recipe
from demp_fx.training.choose import goes
from demp_fx.training.deaths import death_test
from tests.training.nets import Plain, batch, kill, probes


def reference(model: nn.Module, layer: nn.Module, batches: list[Tensor], eps: float) -> Tensor:
    """Eval mode; sum over space and batch; dead if at most eps; in every batch."""
    sums: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, _i, out: sums.append(out.sum((0, 2, 3))))
    model.eval()
    with torch.no_grad():
        for x in batches:
            model(x)
    handle.remove()
    return torch.stack([s <= eps for s in sums]).all(0)


class Named(nn.Module):
    """A network whose activations are modules of their own, to hang hooks on."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), act()
        self.conv2, self.act2 = nn.Conv2d(10, 7, 3), act()
        self.head = nn.Linear(7, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        out: Tensor = self.head(self.act2(self.conv2(x)).mean((2, 3)))
        return out


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU])
@pytest.mark.parametrize("eps", [0.0, 3.0])
def test_one_sided(act: type[nn.Module], eps: float) -> None:
    model = Named(act)
    with torch.no_grad():
        model.bn1.bias[:] = torch.linspace(-4, 1, 10)
        model.conv2.bias[:] = torch.linspace(-3, 2, 7)
    module = instrument(
        demp_fx.trace(model, batch(0)[0]), Recipe(death_threshold=eps, death_test="one-sided")
    )
    found, samples = death_test(module, probes(3), (False,))
    assert samples == 48
    for name in ("act1", "act2"):
        expected = reference(model, getattr(model, name), probes(3), eps)
        assert torch.equal(found[name].mask, expected)
        assert 0 < int(expected.sum()) < expected.numel()


def test_silent_asks_that_nothing_is_above_the_threshold() -> None:
    watch = Watch(1, "silent")
    watch.start()
    watch(torch.tensor([[-0.1, -0.1, 0.0], [-0.2, 0.05, 0.0]]))  # the second sums to less than 0
    assert watch.stop()[0].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("act", "test"),
    [(nn.ReLU, "one-sided"), (nn.GELU, "silent"), (nn.LeakyReLU, "silent"), (nn.Tanh, "two-sided")],
)
def test_each_activation_has_its_own(act: type[nn.Module], test: str) -> None:
    graph = demp_fx.trace(Named(act), batch(0)[0])
    module = instrument(graph, Recipe())
    assert module.get_submodule("demp.act1_watch").test == test
    module = instrument(graph, Recipe(death_test="one-sided"))
    assert module.get_submodule("demp.act1_watch").test == "one-sided"


def test_two_sided_is_for_what_saturates_on_one_side() -> None:
    watch = Watch(1, "two-sided", threshold=0.1)
    watch.start()
    #  always high | always low | both, so no constant | not quite
    watch(torch.tensor([[0.95, -1.0, 0.95, 0.85], [1.0, -0.92, -0.95, 1.0]]))
    watch(torch.tensor([[0.91, -0.99, 0.95, 1.0]]))
    dead, level = watch.stop()
    assert dead.tolist() == [True, True, False, False]
    assert level[:2].tolist() == [1.0, -1.0]


def test_a_side_that_changes_between_batches_is_alive() -> None:
    watch = Watch(1, "two-sided")
    watch.start()
    watch(torch.tensor([[1.0, 1.0]]))
    watch(torch.tensor([[-1.0, 1.0]]))
    assert watch.stop()[0].tolist() == [False, True]


def silent_in_eval_only() -> tuple[nn.Module, int]:
    """A channel whose running mean hides it in eval mode; batch statistics bring it to life."""
    model = Plain()
    with torch.no_grad():
        model.bn1.running_mean[4] = 1e3
    return model, 4


def test_dead_in_both_modes_is_asked_for_by_default() -> None:
    model, channel = silent_in_eval_only()
    kill(model.bn1, [1])
    module = instrument(demp_fx.trace(model, batch(0)[0]), Recipe())
    in_eval = death_test(module, probes(), (False,))[0]["act"].mask
    in_both = death_test(module, probes(), (False, True))[0]["act"].mask
    assert in_eval.nonzero().reshape(-1).tolist() == [1, channel]
    assert in_both.nonzero().reshape(-1).tolist() == [1]


def test_it_leaves_no_trace() -> None:
    model = Plain().train()
    module = instrument(demp_fx.trace(model, batch(0)[0]), Recipe())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = {name: m.training for name, m in module.named_modules()}
    state = torch.get_rng_state()
    death_test(module, probes(), (False, True))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert modes == {name: m.training for name, m in module.named_modules()}
    assert torch.equal(state, torch.get_rng_state())


def test_without_a_batch_nothing_is_known() -> None:
    module = instrument(demp_fx.trace(Plain(), batch(0)[0]), Recipe())
    with pytest.raises(UsageError, match="calibration data is empty"):
        death_test(module, [], (False,))
    assert not module.get_submodule("demp.act_watch").recording


@pytest.mark.parametrize(
    ("dead", "least", "multiple", "stay"),
    [
        ([0, 1, 2], 1, 1, 5),
        ([0, 1, 2, 3, 4, 5, 6, 7], 1, 1, 1),  # a layer is never emptied
        ([0, 1, 2, 3, 4, 5, 6, 7], 3, 1, 3),
        ([0, 1, 2], 1, 4, 8),  # five live: eight is the next multiple of four
        ([0, 1, 2, 3, 4], 1, 4, 4),
        ([0, 1, 2, 3, 4], 20, 1, 8),
        ([], 1, 1, 8),
    ],
)
def test_what_may_go(dead: list[int], least: int, multiple: int, stay: int) -> None:
    mask = torch.zeros(8, dtype=torch.bool)
    mask[dead] = True
    gone = goes(mask, torch.arange(8.0), least, multiple)
    assert 8 - int(gone.sum()) == stay
    assert not bool((gone & ~mask).any())


def test_the_best_dead_ones_stay() -> None:
    mask = torch.tensor([True, True, True, False, True])
    gone = goes(mask, torch.tensor([0.3, 0.9, 0.1, 5.0, 0.2]), least=3, multiple=1)
    assert gone.tolist() == [False, False, True, False, True]
