"""The demon: narrowing while training, what it keeps, and what it does when something fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import demp_fx
from demp_fx.errors import UsageError
from demp_fx.passes import PruningPlan, narrow
from demp_fx.recipe import Recipe
from demp_fx.training import compare as comparison
from demp_fx.training import demon as demon_file
from demp_fx.training import transfer
from tests.training.nets import Plain, Residual, batch, kill, probes

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.02, momentum=0.9),
    "adamw": lambda p: AdamW(p, lr=1e-3),
}
QUIET = {"penalty": 0.0, "noise_std": 0.0, "span": 10, "prune_at_start": False, "cuts": "always"}


def dying() -> Residual:
    """A residual network with dead neurons everywhere: in blocks, behind sums, in the hidden layer.

    They stay dead: the ReLU behind them has no gradient, and nothing decays them back.
    """
    model = Residual()
    kill(model.norm, [0, 3])
    kill(model.block1.bn1, [1, 2, 5])
    kill(model.block2.bn1, [0, 7, 8, 9])
    with torch.no_grad():
        for sum_, channels in ((model.block2, [2, 3, 11]),):
            sum_.bn2.weight[channels] = 0.1
            sum_.bn2.bias[channels] = -50.0
        model.hidden.weight[[4, 6]] *= 0.01
        model.hidden.bias[[4, 6]] = -9.0
    return model


def make(
    model: nn.Module, name: str = "sgd", copies: tuple[nn.Module, ...] = (), **options: object
) -> demp_fx.Demon:
    optimizer = OPTIMIZERS[name](model.parameters())
    return demp_fx.Demon(model, optimizer, batch(0)[0], Recipe(**{**QUIET, **options}), probes(),
                         copies=copies)  # fmt: skip


def train(demon: demp_fx.Demon, first: int, steps: int) -> list[Tensor]:
    losses = []
    for number in range(first, first + steps):
        x, y = batch(number)
        demon.optimizer.zero_grad()
        loss = F.cross_entropy(demon.module(x), y)
        loss.backward()
        demon.optimizer.step()
        demon.step()
        losses.append(loss.detach())
    return losses


WIDTHS = {"relu": 6, "relu_1": 5, "relu_2": 8, "relu_3": 8, "relu_4": 9, "relu_5": 8}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_goes_on_as_if_nothing_had_been_cut(name: str) -> None:
    dense, narrow_ = make(dying(), name, prune_every=100), make(dying(), name, prune_every=3)
    expected, found = train(dense, 0, 9), train(narrow_, 0, 9)
    assert narrow_.events[0].widths == WIDTHS
    assert narrow_.events[0].failure is None
    for a, b in zip(expected, found, strict=True):
        assert float(b) == pytest.approx(float(a), rel=1e-9)
    assert dense.now.size.params > narrow_.now.size.params


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_moment_is_sliced_and_step_counts_stay(name: str) -> None:
    dense, cut = make(dying(), name, prune_every=100), make(dying(), name, prune_every=100)
    train(dense, 0, 4)
    train(cut, 0, 4)
    cut.prune()
    keep = cut.now.plan.keep
    assert len(keep) > 10
    for key, p in cut.module.named_parameters():
        before = dense.optimizer.state[dense.module.get_parameter(key)]
        after = cut.optimizer.state[p]
        assert list(after) == list(before)
        for slot, value in before.items():
            if isinstance(value, Tensor) and value.dim():
                for dim, index in keep.get(key, {}).items():
                    value = value.index_select(dim, torch.tensor(index))
            assert torch.equal(torch.as_tensor(after[slot]), torch.as_tensor(value)), (key, slot)


def test_a_history_of_all_parameters_in_one_vector_is_sliced() -> None:
    def run(prune_every: int) -> tuple[demp_fx.Demon, list[float]]:
        model, (x, y), losses = dying(), batch(0, 32), []
        optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)
        recipe = Recipe(**{**QUIET, "prune_every": prune_every})
        demon = demp_fx.Demon(model, optimizer, x[:2], recipe, probes())

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(demon.module(x), y)
            loss.backward()
            return loss

        for _ in range(6):
            losses.append(float(optimizer.step(closure).detach()))
            demon.step()
        return demon, losses

    (_, expected), (demon, found) = run(100), run(2)
    assert demon.events[0].total_removed > 0
    assert found == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < expected[2]
    vector = demon.optimizer.state_dict()["state"][0]["d"]
    assert vector.numel() == sum(p.numel() for p in demon.module.parameters())


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="it is of another one"):
        demp_fx.Demon(
            Plain(), SGD(Plain().parameters(), 0.1), batch(0)[0], Recipe(**QUIET), probes()
        )


def test_a_state_of_another_network_is_refused() -> None:
    state = make(Plain()).state_dict()
    for other in (state, {"steps": 3}):
        with pytest.raises(UsageError, match="of this network"):
            demp_fx.Demon(Plain(10), None, batch(0)[0], Recipe(**QUIET), probes(), state=other)


def test_every_parameter_is_still_trained_and_frozen_ones_are_not() -> None:
    model = dying()
    frozen = {"block1.conv2.weight", "hidden.bias"}
    for key in frozen:
        model.get_parameter(key).requires_grad_(False)
    demon = make(model, "adamw", prune_every=3, penalty=0.01, noise_std=1e-3)
    train(demon, 0, 3)
    assert demon.events[0].total_removed > 0
    before = {key: p.detach().clone() for key, p in demon.module.named_parameters()}
    train(demon, 3, 2)
    moved = {
        k for k, p in demon.module.named_parameters() if not torch.equal(p.detach(), before[k])
    }
    assert moved == set(before) - frozen
    assert {k for k, p in demon.module.named_parameters() if not p.requires_grad} == frozen
    trained = {id(p) for group in demon.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in demon.module.parameters()}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_module_stays(training: bool) -> None:
    demon = make(dying())
    demon.module.train(training)
    demon.module.get_submodule("block1.bn1").train(not training)
    before = {name: m.training for name, m in demon.module.named_modules()}
    assert demon.prune().total_removed > 0
    assert {name: m.training for name, m in demon.module.named_modules()} == before


def test_the_module_stays_the_same_object() -> None:
    demon = make(dying())
    module = demon.module
    demon.prune()
    assert demon.module is module
    assert module.get_parameter("stem.weight").shape[0] == 6
    assert module(batch(3)[0]).shape == (8, 5)
    assert list(copy.deepcopy(module).state_dict()) == list(dying().state_dict())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_a_compiled_module_follows() -> None:
    torch._dynamo.reset()
    demon = make(dying())
    compiled = torch.compile(demon.module, fullgraph=True, backend="aot_eager")
    x = batch(3)[0]
    expected = compiled(x)
    demon.prune()
    found = compiled(x)
    assert torch.allclose(expected, found, atol=1e-10)
    F.cross_entropy(found, batch(3)[1]).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in demon.module.parameters())


def test_several_prunings_follow_each_other() -> None:
    demon = make(dying())
    assert demon.prune().widths == WIDTHS
    module = demon.module
    kill(module.get_submodule("norm"), [1])
    kill(module.get_submodule("block2.bn1"), [0, 1])
    x = batch(5)[0]
    expected = module.eval()(x)
    event = demon.prune()
    assert event.removed == {"relu": 1, "relu_3": 2}
    assert torch.allclose(module(x), expected, atol=1e-10)
    assert demon.prune().total_removed == 0


def test_each_block_keeps_its_own_channels() -> None:
    """Dead behind a block's sum though alive before it, and the other way round."""
    demon = make(dying())
    with torch.no_grad():
        demon.module.get_parameter("block1.bn2.weight")[[4, 5]] = 0.1
        demon.module.get_parameter("block1.bn2.bias")[[4, 5]] = -50.0
    x = batch(5)[0]
    expected = demon.module.eval()(x)
    event = demon.prune()
    assert event.failure is None
    assert (event.widths["relu"], event.widths["relu_2"]) == (6, 6)
    assert torch.allclose(demon.module(x), expected, atol=1e-10)


# -- copies ---------------------------------------------------------------------------------------


def test_an_average_is_narrowed_along() -> None:
    demon = make(dying(), prune_every=3)
    ema = AveragedModel(demon.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    demon.register(ema)
    for number in range(6):
        train(demon, number, 1)
        ema.update_parameters(demon.module)
    assert demon.events[0].total_removed > 0
    ours = {k: p.shape for k, p in demon.module.named_parameters()}
    assert {k: p.shape for k, p in ema.module.named_parameters()} == ours
    x = batch(9)[0]
    assert torch.isfinite(ema.eval()(x)).all()


def test_a_copy_keeps_numbers_of_its_own() -> None:
    demon = make(dying())
    ema = copy.deepcopy(demon.module)
    with torch.no_grad():
        for p in ema.parameters():
            p += 0.5
    demon.register(ema)
    before = {k: p.detach().clone() for k, p in ema.named_parameters()}
    demon.prune()
    for key, p in ema.named_parameters():
        expected = before[key]
        for dim, index in demon.now.plan.keep.get(key, {}).items():
            expected = expected.index_select(dim, torch.tensor(index))
        assert torch.equal(p.detach(), expected)


def test_what_is_no_copy_is_refused() -> None:
    with pytest.raises(UsageError, match="no copy of demon"):
        make(dying()).register(dying())


# -- safety ---------------------------------------------------------------------------------------


def state_of(demon: demp_fx.Demon) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in demon.module.state_dict().items()}


def test_a_narrowing_that_fails_verification_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    demon = make(dying(), "adamw", prune_every=3)
    train(demon, 0, 2)
    before, code = state_of(demon), demon.module.code
    monkeypatch.setattr(comparison, "difference", lambda a, b: 0.5)
    event = demon.prune()
    assert event.failure is not None
    assert "off by 5.0e-01" in event.failure
    assert event.total_removed == 0
    assert demon.module.code == code
    assert all(torch.equal(v, before[k]) for k, v in demon.module.state_dict().items())
    assert event.widths == {**WIDTHS, "relu": 8, "relu_1": 8, "relu_3": 12, "relu_4": 12,
                            "relu_5": 10}  # fmt: skip
    monkeypatch.undo()
    train(demon, 2, 1)  # training goes on, and the next check succeeds
    assert demon.events[-1].widths == WIDTHS


def test_a_real_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of the wrong channels must not get past the comparison."""
    demon = make(dying())
    original = demon_file.Transfer.tensor

    def wrong(self: object, name: str, value: Tensor) -> Tensor:
        out = original(self, name, value)
        return out.flip(0) if name == "stem.weight" else out

    monkeypatch.setattr(demon_file.Transfer, "tensor", wrong)
    event = demon.prune()
    assert event.failure is not None
    assert "undone" in event.failure


def test_a_commit_that_breaks_off_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    demon = make(dying(), "adamw")
    ema = copy.deepcopy(demon.module)
    demon.register(ema)
    train(demon, 0, 2)
    before = state_of(demon)
    groups = [id(p) for g in demon.optimizer.param_groups for p in g["params"]]
    calls = []

    def install(target: nn.Module, new: nn.Module) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        transfer.install(target, new)

    with monkeypatch.context() as patch:
        patch.setattr(demon_file, "install", install)
        event = demon.prune()
    assert event.failure == "RuntimeError: out of memory"
    assert [id(p) for g in demon.optimizer.param_groups for p in g["params"]] == groups
    assert all(torch.equal(v, before[k]) for k, v in demon.module.state_dict().items())
    assert set(demon.optimizer.state) == set(demon.module.parameters())
    train(demon, 2, 1)
    assert demon.prune().widths == WIDTHS


def test_a_layer_is_never_emptied() -> None:
    model = Plain()
    kill(model.bn1, range(8))
    demon = make(model)
    event = demon.prune()
    assert event.dead["act"] == 8
    assert event.widths["act"] == 1
    assert demon.module(batch(0)[0]).shape == (8, 5)


def test_minimum_width_and_rounding() -> None:
    model = Plain()
    kill(model.bn1, [0, 1, 2, 3, 4])
    assert make(copy.deepcopy(model), min_width=5).prune().widths["act"] == 5
    assert make(copy.deepcopy(model), round_to=2).prune().widths["act"] == 4
    event = make(copy.deepcopy(model), round_to=8).prune()
    assert event.widths["act"] == 8
    assert event.total_removed == 0


def test_weights_that_are_zero_only_now_are_not_pruned() -> None:
    """A zero-initialised last scale is no death: it gets a gradient, and will be trained."""
    model = Residual()
    nn.init.zeros_(model.block1.bn2.weight)
    demon = make(model)
    assert "relu_2" not in demon.prune().removed
    train(demon, 0, 1)
    assert bool((demon.module.get_parameter("block1.bn2.weight") != 0).all())


def test_exempt_layers_are_left_alone() -> None:
    demon = make(dying(), exempt=["block?.conv1"])
    assert demon.prune().removed == {"relu": 2, "relu_4": 3, "relu_5": 2}


def test_approximate_deaths_are_cut_as_if_they_gave_zero() -> None:
    """One-sided for GELU: what is cut is not zero, so the network changes, and by no more."""
    model = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 3)).double()
    torch.manual_seed(0)
    with torch.no_grad():
        model[0].bias[:5] = -3.0
    x = torch.randn(32, 4, dtype=torch.float64)
    demon = demp_fx.Demon(model, None, x, Recipe(**QUIET, death_test="one-sided"), [x])
    hidden = F.gelu(model[0](x))
    dead = hidden.sum(0) <= 0
    expected = model[2](hidden * ~dead)
    event = demon.prune()
    assert event.failure is None
    assert event.removed == {"_1": int(dead.sum())}
    assert int(dead.sum()) >= 5
    assert torch.allclose(demon.module(x), expected, atol=1e-12)


def test_saturated_tanh_units_are_folded_into_the_next_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        model[0].bias[:4] = torch.tensor([30.0, -30.0, 25.0, 40.0])
    x = torch.randn(32, 4, dtype=torch.float64)
    expected = model(x)
    demon = demp_fx.Demon(model, None, x, Recipe(**QUIET, death_threshold=1e-9), [x])
    event = demon.prune()
    assert event.failure is None
    assert event.widths == {"_1": 8}
    assert torch.allclose(demon.module(x), expected, atol=1e-8)


def test_channels_come_back_as_zeros_where_a_later_plan_wants_them() -> None:
    shapes = {"w": torch.Size([4, 3])}
    old = PruningPlan(keep={"w": {0: [1, 3]}})
    new = PruningPlan(keep={"w": {0: [0, 1], 1: [0, 2]}})
    value = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    moved = transfer.Transfer(shapes, old, new).tensor("w", value)
    assert moved.tolist() == [[0.0, 0.0], [1.0, 3.0]]


# -- finish and record ----------------------------------------------------------------------------


def test_finish_hands_over_a_plain_module_and_a_plan_that_replays() -> None:
    model = dying()
    demon = make(model, prune_every=3)
    train(demon, 0, 3)
    kill(demon.module.get_submodule("block2.bn1"), [0])
    result = demon.finish()
    assert "demp" not in result.module.code
    assert result.report.params_before == sum(p.numel() for p in dying().parameters())
    assert result.report.params_after == sum(p.numel() for p in result.module.parameters())
    assert result.report.macs_after < result.report.macs_before
    again = narrow(demp_fx.trace(dying(), batch(0)[0]), result.plan)
    again.load_state_dict(result.module.state_dict())
    x = batch(7)[0]
    assert torch.equal(again.eval()(x), result.module.eval()(x))
    assert result.report.verification.eval_error < 1e-9


def test_finish_without_a_death_hands_over_the_dense_network() -> None:
    model = Plain()
    demon = make(model)
    result = demon.finish()
    assert result.plan.keep == {}
    assert result.report.params_after == sum(p.numel() for p in model.parameters())
    x = batch(1)[0]
    assert torch.equal(result.module.eval()(x), model.eval()(x))


def test_the_record_has_an_entry_for_every_check() -> None:
    demon = make(dying(), prune_every=2, penalty=0.1, noise_std=0.01, prune_at_start=True)
    train(demon, 0, 4)
    assert [e.step for e in demon.events] == [0, 2, 4]
    first = demon.events[0]
    assert first.removed == {"relu": 2, "relu_1": 3, "relu_3": 4, "relu_4": 3, "relu_5": 2}
    assert first.size.channels == sum(first.widths.values())
    assert demon.events[-1].size.params == sum(p.numel() for p in demon.module.parameters())
    assert {"check", "plan", "narrow", "verify", "commit"} <= set(first.seconds)
    assert first.penalty == pytest.approx(0.1 / 25)


def test_macs_in_the_record_are_those_of_the_layers() -> None:
    model = Plain()
    kill(model.bn1, [0, 1])
    demon = make(model)
    size = demon.prune().size
    # batch 8, 6x6 pixels: 3 -> 6, 6 -> 6 channels of 3x3, and a head of 6 -> 5
    assert size.macs == 8 * (36 * 9 * (3 * 6 + 6 * 6) + 6 * 5)


def test_going_on_from_a_state_gives_the_same_numbers() -> None:
    options = {"prune_every": 3, "penalty": 0.05, "noise_std": 1e-2}
    whole = make(dying(), "adamw", **options)
    train(whole, 0, 4)
    saved = copy.deepcopy((whole.state_dict(), whole.module.state_dict(),
                           whole.optimizer.state_dict()))  # fmt: skip
    expected = train(whole, 4, 4)

    fresh = Residual()
    optimizer = OPTIMIZERS["adamw"](fresh.parameters())
    demon = demp_fx.Demon(fresh, optimizer, batch(0)[0], Recipe(**{**QUIET, **options}), probes(),
                          state=saved[0])  # fmt: skip
    demon.module.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    found = train(demon, 4, 4)
    assert [float(a) for a in expected] == [float(b) for b in found]
    ours, theirs = demon.module.state_dict(), whole.module.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    assert [e.step for e in demon.events] == [e.step for e in whole.events]


def test_inputs_by_name_and_depthwise_layers() -> None:
    class Mobile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
            self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
            self.bn2 = nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 5)
            self.double()

        def forward(self, image: Tensor, scale: Tensor) -> Tensor:
            x = F.relu6(self.bn1(self.expand(image * scale)))
            out: Tensor = self.head(F.relu6(self.bn2(self.depth(x))).mean((2, 3)))
            return out

    model = Mobile()
    kill(model.bn1, [2])
    kill(model.bn2, [2])
    x = {"image": batch(0)[0], "scale": torch.ones((), dtype=torch.float64)}
    demon = demp_fx.Demon(model, None, x, Recipe(**QUIET), [x])
    expected = model.eval()(**x)
    event = demon.prune()
    assert event.failure is None
    assert set(event.widths.values()) == {7}
    assert torch.allclose(demon.module.eval()(**x), expected, atol=1e-12)


class Grouped(nn.Module):
    """A grouped convolution between two plain ones, as in ResNeXt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.head(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))
        return out


def test_grouped_convolutions_keep_training() -> None:
    dense, cut = Grouped(), Grouped()
    for model in (dense, cut):  # the same number in each group, at other places
        kill(model.bn1, [0, 5, 10, 15])
        kill(model.bn2, [1, 2, 4, 7, 8, 9, 14, 15])
    runs = [make(m, "adamw", prune_every=every) for m, every in ((dense, 100), (cut, 3))]
    expected, found = (train(demon, 0, 4) for demon in runs)
    event = runs[1].events[0]
    assert event.failure is None
    assert event.widths == {"relu": 12, "relu_1": 8}
    assert runs[1].module.get_parameter("conv2.weight").shape == (8, 3, 3, 3)
    kill(runs[0].module.get_submodule("bn1"), [1, 6, 11, 12])
    narrow_bn = runs[1].module.get_submodule("bn1")
    kill(narrow_bn, [0, 4, 8, 9])
    expected += train(runs[0], 4, 4)
    found += train(runs[1], 4, 4)
    assert runs[1].events[1].failure is None
    assert runs[1].module.get_parameter("conv2.weight").shape == (8, 2, 3, 3)
    for a, b in zip(expected, found, strict=True):
        assert float(b) == pytest.approx(float(a), rel=1e-8)


def test_a_network_without_activations_has_nothing_to_prune() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="nothing to prune"):
        demp_fx.Demon(model, None, torch.randn(2, 3), Recipe(), [torch.randn(2, 3)])
