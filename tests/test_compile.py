"""Compile: what goes, what stays, where constants end up, and what a plan can do."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.cuts import Cuts
from demp_fx.errors import UsageError, VerificationError
from demp_fx.passes import make_plan, narrow, verify


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def silence(norm: nn.Module, channels: list[int], shift: float = 0.0) -> None:
    """Make channels of a batch norm constant."""
    with torch.no_grad():
        norm.get_parameter("weight")[channels] = 0
        norm.get_parameter("bias")[channels] = shift


def assert_same(a: nn.Module, b: nn.Module, x: Tensor, tolerance: float = 1e-11) -> None:
    for training in (False, True):
        expected, found = a.train(training)(x), b.train(training)(x)
        assert float((expected - found).detach().abs().max()) < tolerance


class Net(nn.Module):
    """conv - norm - relu - conv - norm - relu - mean - linear."""

    def __init__(self, padding: int = 1, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=padding, bias=bias)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """A residual block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.conv1(x))
        return self.head(torch.relu(x + self.norm(self.conv2(y))))


# -- zeros ---------------------------------------------------------------------------------------


def test_dead_channels_are_sliced_from_everything_that_carries_them() -> None:
    model = Net()
    silence(model.norm1, [0, 3, 4])
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    shapes = {name: tuple(p.shape) for name, p in result.module.state_dict().items()}
    assert shapes["conv1.weight"] == (5, 3, 3, 3)
    assert shapes["norm1.running_var"] == (5,)
    assert shapes["conv2.weight"] == (6, 5, 3, 3)
    assert list(shapes) == list(model.state_dict())
    conv = result.module.get_submodule("conv1")
    assert (conv.in_channels, conv.out_channels) == (3, 5)
    assert_same(model, result.module, image(3, 3, 11, 9))


def test_channels_that_nobody_reads_go_as_well() -> None:
    model = Net()
    with torch.no_grad():
        model.head.weight[:, [1, 2]] = 0
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.module.get_parameter("conv2.weight").shape[0] == 4
    assert_same(model, result.module, image(3, 3, 8, 8))


def test_death_travels_backward_through_layers() -> None:
    model = Net()
    with torch.no_grad():
        model.conv2.weight[:, [5, 6]] = 0
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.module.get_parameter("conv1.weight").shape[0] == 6


def test_inference_mode_around_it_does_not_matter() -> None:
    model = Block().eval()
    silence(model.norm, [0, 1, 2])
    with torch.inference_mode():
        module = demp_fx.compile(model, image(2, 3, 8, 8)).module
    assert module.get_parameter("norm.weight").numel() == model.norm.num_features - 3
    module(image(2, 3, 8, 8)).sum().backward()


def test_nothing_dead_nothing_changed() -> None:
    model = Net()
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.plan.keep == {}
    assert result.report.params_after == result.report.params_before
    for (name, p), q in zip(result.module.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.data_ptr() != q.data_ptr()


def test_the_original_is_left_as_it_was() -> None:
    model = Net().train()
    silence(model.norm1, [0])
    before = copy.deepcopy(model.state_dict())
    demp_fx.compile(model, image(2, 3, 8, 8), calibration=[image(4, 3, 8, 8)])
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_module_that_stays_whole_writes_down_is_not_that_of_a_trial() -> None:
    class Counts(nn.Module):
        """Cannot be traced, and can be run on numbers only."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.sums, self.last = torch.zeros(3), torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.sums[0] = x.sum()
            self.last = x
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(4, 4), Counts(), nn.Linear(4, 2))
    demp_fx.compile(model, torch.randn(2, 4))
    counts = model[1]
    assert (counts.calls, counts.sums.sum(), counts.last.tolist()) == (0, 0, [0, 0, 0])


def test_what_the_forward_keeps_of_an_image_is_not_that_of_a_trial() -> None:
    class Windows(nn.Module):
        """Narrows its windows for good once an image is smaller than they are."""

        def __init__(self) -> None:
            super().__init__()
            self.make, self.read, self.side = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), 8

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 8:
                self.side = 4
            return self.read(nn.functional.avg_pool2d(self.make(x), self.side, 4))

    model = Windows().double()
    report = demp_fx.compile(model, image(2, 3, 8, 8)).report
    assert report.verification is not None
    assert report.verification.sized
    assert model.side == 8


# -- constants -----------------------------------------------------------------------------------


def test_constants_fold_into_a_bias_where_no_padding_forbids_it() -> None:
    model = Net(padding=0, bias=True)
    silence(model.norm1, [0, 3, 4], shift=0.7)
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.module.get_parameter("conv1.weight").shape[0] == 5
    assert (result.report.constants_folded, result.report.carriers) == (3, 0)
    assert_same(model, result.module, image(3, 3, 12, 9))


@pytest.mark.parametrize("padding", [1, 2])
def test_one_carrier_stands_for_all_constants_under_zero_padding(padding: int) -> None:
    model = Net(padding=padding)
    silence(model.norm1, [0, 3, 4], shift=0.7)
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.module.get_parameter("conv1.weight").shape[0] == 6
    assert (result.report.constants_folded, result.report.carriers) == (2, 1)
    assert_same(model, result.module, image(3, 3, 12, 9))


def test_a_constant_below_zero_is_dead_behind_a_relu() -> None:
    model = Net()
    silence(model.norm1, [0, 3], shift=-0.4)
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.module.get_parameter("conv1.weight").shape[0] == 6
    assert result.report.carriers == 0


def test_constants_that_differ_between_the_modes_need_two_carriers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).double()
    with torch.no_grad():
        model.get_parameter("0.weight")[:5] = 0  # the norm sees zeros there
        model.get_buffer("1.running_mean").normal_()
        model.get_parameter("1.bias").fill_(2.0)
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.module.get_parameter("0.weight").shape[0] == 3 + 2
    assert_same(model, result.module, image(3, 3, 9, 9))


def test_average_pooling_of_padded_constants_is_carried() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 4, 1)
    ).double()
    silence(model.get_submodule("1"), [1, 2, 5], shift=0.6)
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.module.get_parameter("0.weight").shape[0] == 6
    assert_same(model, result.module, image(3, 3, 13, 7))


PADDED_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda x: x.flatten(1).unflatten(1, (-1, 1, 1)),
    "unshuffled": lambda x: F.pixel_unshuffle(x, 2),
    "crops": lambda x: torch.cat([x[..., 1:], x[..., :-1]], 1),
    "turned": lambda x: torch.cat([x, x.transpose(2, 3)], 1),
}


@pytest.mark.parametrize("way", list(PADDED_POOLS))
@pytest.mark.parametrize("cuts", ["never", "always"])
def test_what_an_average_pooling_makes_of_constants_is_another_one_elsewhere(
    way: str, cuts: Cuts
) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.pool = nn.AvgPool2d(3, 1, 1)
            self.b = nn.Conv2d(PADDED_POOLS[way](torch.zeros(1, 8, 4, 4)).shape[1], 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(PADDED_POOLS[way](self.pool(self.norm(self.a(x)))))
            return result

    model = Pooled().double()
    silence(model.norm, [1, 2, 5], shift=0.6)
    result = demp_fx.compile(model, image(2, 3, 4, 4), cuts=cuts, verify=False)
    assert_same(model, result.module, image(3, 3, 4, 4))


def test_a_weight_that_is_read_twice_folds_nothing() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sigmoid(self.b(torch.sigmoid(self.a(x)))))

    model = Twice()
    with torch.no_grad():
        model.a.weight[:3] = 0
        model.b.weight[:3] = 0
    result = demp_fx.compile(model, image(5, 4))
    assert_same(model, result.module, image(3, 4))


# -- residuals and concats -----------------------------------------------------------------------


def test_a_channel_dead_in_the_branch_only_stays_in_the_stream() -> None:
    model = Block()
    silence(model.norm, [0, 1, 2, 3, 4])
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.module.get_parameter("stem.weight").shape[0] == 8
    assert result.module.get_parameter("conv2.weight").shape[0] == 3
    assert result.report.scatters == 1
    assert_same(model, result.module, image(3, 3, 8, 8))


def test_constants_of_a_branch_are_added_to_the_stream() -> None:
    model = Block()
    silence(model.norm, [0, 1, 2, 3, 4], shift=0.3)
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.module.get_parameter("conv2.weight").shape[0] == 3
    assert list(result.module.state_dict()) == list(model.state_dict())
    assert_same(model, result.module, image(3, 3, 8, 8))


@pytest.mark.parametrize(("cuts", "width"), [("always", 7), ("pays", 8), ("never", 8)])
def test_a_cut_must_pay(cuts: str, width: int) -> None:
    model = Block()
    silence(model.norm, [0])
    result = demp_fx.compile(model, image(2, 3, 32, 32), cuts=cuts)  # type: ignore[arg-type]
    assert result.module.get_parameter("conv2.weight").shape[0] == width
    assert_same(model, result.module, image(3, 3, 8, 8))


def test_neither_side_of_a_sum_needs_all_channels() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.norm_a, self.norm_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.head = nn.Conv2d(8, 4, 3, padding=1)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm_a(self.a(x)) + self.norm_b(self.b(x)))

    for shift in (0.0, 0.5):
        model = Two()
        silence(model.norm_a, [0, 1, 2, 3], shift)
        silence(model.norm_b, [3, 4, 5, 6], shift)
        result = demp_fx.compile(model, image(2, 3, 8, 8))
        assert result.module.get_parameter("a.weight").shape[0] == 4
        assert result.module.get_parameter("b.weight").shape[0] == 4
        assert_same(model, result.module, image(3, 3, 9, 9))


def test_readers_of_one_concat_each_take_what_they_need() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
            self.reads = nn.ModuleList(nn.Conv2d(16, 32, 3) for _ in range(2))
            self.double()

        def forward(self, x: Tensor) -> list[Tensor]:
            y = torch.cat([self.a(x), self.b(x)], 1)
            return [r(torch.relu(n(y))) for n, r in zip(self.norms, self.reads, strict=True)]

    model = Dense()
    silence(model.norms[0], [0, 1, 2, 3, 8, 9, 10, 11])
    silence(model.norms[1], [0, 1, 4, 5, 8, 9, 12, 13])
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert [result.module.get_parameter(f"reads.{k}.weight").shape[1] for k in (0, 1)] == [8, 8]
    assert result.module.get_parameter("a.weight").shape[0] == 6  # 0 and 1 are read by nobody
    assert result.report.gathers == 2
    x = image(3, 3, 8, 8)
    for a, b in zip(model.eval()(x), result.module.eval()(x), strict=True):
        assert float((a - b).detach().abs().max()) < 1e-11


# -- data ----------------------------------------------------------------------------------------


def test_what_never_fires_on_the_calibration_data_goes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
    with torch.no_grad():
        model.get_parameter("0.bias")[[1, 6]] = -100.0
    data = [image(4, 3, 8, 8), image(4, 3, 8, 8)]
    assert demp_fx.compile(model, data[0]).plan.keep == {}
    result = demp_fx.compile(model, data[0], calibration=data)
    assert result.module.get_parameter("0.weight").shape[0] == 6
    assert result.report.dead_observed == 2
    assert any("8 calibration samples" in line for line in result.report.assumptions)


def test_pairs_of_input_and_target_calibrate_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
    with torch.no_grad():
        model.get_parameter("0.bias")[0] = -100.0
    data = [(image(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))]
    result = demp_fx.compile(model, image(1, 3, 8, 8), calibration=data)
    assert result.report.dead_observed == 1


class Largest(nn.Module):
    """Channels that are shut once any of the samples is large there."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.hidden.weight.data = torch.eye(4)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last((1 - self.hidden(x).amax(0, keepdim=True)).relu())
        return out


def test_what_samples_do_together_is_compared_with_all_of_them() -> None:
    model, data = Largest(), torch.zeros(8, 4, dtype=torch.float64)
    data[6, :2] = 2  # the first few samples leave all channels open
    result = demp_fx.compile(model, data, calibration=[data])
    assert result.module.get_submodule("hidden").out_features == 2
    assert result.report.verification is not None
    assert result.report.verification.batch == 8
    assert torch.allclose(result.module(data), model(data))


def test_few_samples_are_compared_where_each_is_for_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    model[0].weight.data[:4], model[0].bias.data[:4] = 0, -1
    data = torch.randn(64, 4, dtype=torch.float64)
    for calibration in (None, [data]):
        found = demp_fx.compile(model, data, calibration=calibration).report.verification
        assert found is not None
        assert found.batch < 8


def test_no_calibration_data_is_an_error() -> None:
    with pytest.raises(UsageError, match="empty"):
        demp_fx.compile(Net(), image(2, 3, 8, 8), calibration=[])


# -- parameters ----------------------------------------------------------------------------------


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.mix = nn.Linear(8, 8)
            self.out = nn.Linear(8, 10, bias=False)
            self.out.weight = self.embed.weight
            self.double()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(torch.relu(self.mix(self.embed(tokens))))

    model = Tied()
    with torch.no_grad():
        model.embed.weight[:, [2, 5]] = 0
    result = demp_fx.compile(model, torch.randint(0, 10, (3, 4)))
    narrow_embed = result.module.get_parameter("embed.weight")
    assert narrow_embed.shape == (10, 6)
    assert result.module.get_parameter("out.weight") is narrow_embed
    tokens = torch.randint(0, 10, (2, 7))
    assert torch.allclose(result.module(tokens), model(tokens), atol=1e-12)


def test_frozen_parameters_dtypes_and_memory_formats_stay() -> None:
    model = Net().to(torch.float32).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.conv1.weight.requires_grad_(False)
    silence(model.norm1, [0])
    module = demp_fx.compile(model, torch.randn(2, 3, 8, 8)).module
    assert not module.get_parameter("conv1.weight").requires_grad
    assert module.get_parameter("conv2.weight").dtype == torch.float32
    weight = module.get_parameter("conv2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_result_can_be_copied_pickled_and_reloaded() -> None:
    model = Block().eval()
    silence(model.norm, [0, 1, 2, 3, 4], shift=0.3)
    module, x = demp_fx.compile(model, image(2, 3, 8, 8)).module, image(2, 3, 8, 8)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert list(twin.state_dict()) == list(module.state_dict())
        twin.load_state_dict(module.state_dict())


# -- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_a_plan_replays_on_a_checkpoint(shift: float) -> None:
    model = Block()
    silence(model.norm, [0, 1, 2, 3, 4], shift)
    with torch.no_grad():
        model.conv1.weight[[1, 2]] = 0
        model.conv1.bias[[1, 2]] = 0.5
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    plan = demp_fx.PruningPlan.from_json(result.plan.to_json())
    assert plan == result.plan
    other = Block()
    other.load_state_dict(model.state_dict())
    again = narrow(demp_fx.trace(other, image(2, 3, 8, 8)), plan)
    x = image(2, 3, 8, 8)
    assert torch.equal(again(x), result.module(x))
    assert again.code == result.module.code


def test_a_plan_of_another_model_is_refused() -> None:
    model = Net()
    silence(model.norm1, [0])
    plan = demp_fx.compile(model, image(2, 3, 8, 8)).plan
    with pytest.raises(UsageError, match=r"conv1\.weight"):
        narrow(demp_fx.trace(nn.Linear(3, 3), torch.randn(1, 3)), plan)
    with pytest.raises(UsageError, match="not a pruning plan"):
        demp_fx.PruningPlan.from_json('{"keep": 3}')


# -- passes and verification ---------------------------------------------------------------------


def test_passes_apply_one_by_one() -> None:
    model = Net().eval()
    silence(model.norm1, [0, 1])
    graph = demp_fx.trace(model, image(2, 3, 8, 8))
    plan = make_plan(graph)
    module = narrow(graph, plan)
    assert verify(model, module, image(2, 3, 8, 8)).eval_error < 1e-12
    assert module.get_parameter("conv1.weight").shape[0] == 6


def test_a_wrong_result_is_not_handed_over() -> None:
    model = Net().eval()
    graph = demp_fx.trace(model, image(2, 3, 8, 8))
    plan = make_plan(graph)
    plan.keep = {
        **{f"norm1.{k}": {0: [0, 1]} for k in ("weight", "bias", "running_mean", "running_var")},
        "conv1.weight": {0: [0, 1]},
        "conv2.weight": {1: [0, 1]},
    }
    with pytest.raises(VerificationError, match="nothing was handed over"):
        verify(model, narrow(graph, plan), image(2, 3, 8, 8))


class Chaotic(nn.Module):
    """Every step doubles what two numbers are apart."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.hidden, self.last = steps, nn.Linear(6, 999), nn.Linear(999, 4)
        self.double().eval()
        with torch.no_grad():
            self.hidden.weight[:501] = self.hidden.bias[:501] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.last(self.hidden(x).relu()))
        for _ in range(self.steps):
            x = 4 * x * (1 - x)
        return x


def test_what_a_network_makes_of_rounding_is_no_error() -> None:
    torch.manual_seed(0)
    model, x = Chaotic(26), torch.randn(1, 64, 6, dtype=torch.float64)
    result = demp_fx.compile(model, x)
    found = result.report.verification
    assert found is not None
    assert 1e-9 < found.eval_error <= found.tolerance <= 1e-5
    with pytest.raises(VerificationError):  # of this, nothing can be compared
        demp_fx.compile(Chaotic(52), x)


def test_macs_are_those_of_torchs_own_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = Net()
    silence(model.norm1, [0, 1, 2])
    x = image(2, 3, 8, 8)
    result = demp_fx.compile(model, x)
    for module, macs in (
        (model, result.report.macs_before), (result.module, result.report.macs_after),
    ):  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            module(x)
        assert counter.get_total_flops() == 2 * macs


def test_dict_and_tuple_inputs_and_outputs() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, object]:
            y = torch.relu(self.a(x))
            if scale is not None:
                y = y * scale
            return {"out": self.b(y), "pair": (x.sum(), [x])}

    for example in ({"x": torch.randn(2, 4), "scale": torch.randn(2, 1)}, (torch.randn(2, 4),)):
        model = Many()
        with torch.no_grad():
            model.a.weight[:2] = 0
            model.a.bias[:2] = 0
        result = demp_fx.compile(model, example)  # type: ignore[arg-type]
        assert result.module.get_parameter("a.weight").shape[0] == 6
        assert result.report.verification is not None


def test_weights_that_are_not_there_yet_are_asked_for() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(UsageError, match=r"0\.weight has no numbers.*meta device.*analyze"):
        demp_fx.compile(model, torch.zeros(1, 4))


def test_weights_that_are_not_finite_are_refused_and_masks_are_not() -> None:
    model = Net()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"conv2\.weight"):
        demp_fx.compile(model, image(2, 3, 8, 8))
    model = Net()
    model.register_buffer("mask", torch.full((3,), float("-inf")))
    demp_fx.compile(model, image(2, 3, 8, 8))


def test_inputs_that_do_not_fit_are_named_with_the_users_line() -> None:
    with pytest.raises(UsageError, match=r"conv1.*test_compile\.py:\d+"):
        demp_fx.compile(Net(), image(2, 4, 8, 8))


def test_a_layer_that_is_dead_altogether_keeps_one_channel_and_is_reported() -> None:
    model = Net()
    silence(model.norm1, list(range(8)))
    result = demp_fx.compile(model, image(2, 3, 8, 8))
    assert result.module.get_parameter("conv1.weight").shape[0] == 1
    assert any("conv1" in line for line in result.report.warnings)
    assert_same(model, result.module, image(3, 3, 8, 8))


def test_every_random_dead_set_of_a_small_network_is_exact() -> None:
    for dead in itertools.chain.from_iterable(
        itertools.combinations(range(4), n) for n in range(5)
    ):
        model = Net()
        silence(model.norm1, [2 * d for d in dead], shift=0.1)
        silence(model.norm2, list(dead), shift=-0.1)
        result = demp_fx.compile(model, image(2, 3, 6, 6), verify=False)
        assert_same(model, result.module, image(3, 3, 7, 5))


@pytest.mark.parametrize("training", [False, True], ids=["for-use", "for-training"])
def test_a_network_with_a_head_for_training_compiles_for_either_mode(training: bool) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.head, self.auxiliary = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Any:
            x = self.norm(self.conv(x))
            return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

    model, x = TwoHeads().double().train(training), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model.norm.weight[:3] = 0
        model.norm.bias[:3] = 0

    narrow = demp_fx.compile(model, x).module

    expected = model(x)
    torch.testing.assert_close(narrow(x), expected, rtol=1e-10, atol=1e-12)
    assert narrow.get_submodule("head").weight.shape == (4, 5, 1, 1)
    if training:
        assert narrow.get_submodule("auxiliary").weight.shape == (4, 5, 3, 3)


def test_a_row_that_is_zero_says_nothing_of_the_rows_that_data_chooses() -> None:
    class Positions(nn.Module):
        """Counts the words that are no padding, and looks their places up in a table."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Buffer(torch.randn(6, 8))
            self.words, self.read = nn.Embedding(10, 8), nn.Linear(8, 3)
            self.table[0] = 0

        def forward(self, words: Tensor) -> Tensor:
            places = (words > 3).long().cumsum(1)
            chosen = self.table.index_select(0, places.view(-1)).view(*places.shape, -1)
            return self.read(self.words(words) + chosen + self.table[places])

    model = Positions().double()
    result = demp_fx.compile(model, torch.randint(0, 10, (2, 5)))
    assert result.module.get_buffer("table").shape == (6, 8)


@pytest.mark.parametrize("shift", [0.0, 0.5], ids=["zero", "constant"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_on_a_transposed_input_is_cut_too(bias: bool, shift: float) -> None:
    """torch multiplies by a weight expanded over the batch then, and adds the bias apart."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.up(x.transpose(-1, -2)))
            return self.down(hidden.transpose(0, 1))

    model, x = Mixer().double().eval(), torch.randn(2, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        model.up.weight[:3] = 0
        model.up.bias[:3] = shift

    narrow = demp_fx.compile(model, x, cuts="always").module

    fresh = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(narrow(fresh), model(fresh), rtol=1e-10, atol=1e-12)
    if shift == 0.0:
        assert narrow.get_submodule("up").weight.shape == (5, 4)
        assert narrow.get_submodule("down").weight.shape == (3, 5)


def test_a_layer_of_one_input_channel_gets_narrower() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 5, 1)
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for p in model[1].parameters():
            p[:4] = 0
    narrow = demp_fx.compile(model, torch.randn(2, 1, 6, 6, dtype=torch.float64)).module
    assert narrow.get_parameter("0.weight").shape == (8, 1, 3, 3)


def test_its_graph_prints_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    demp_fx.compile(model, torch.randn(2, 4)).module.graph.print_tabular()
    printed = capsys.readouterr().out
    rows = [line.split()[:2] for line in printed.splitlines()[2:]]
    assert rows == [
        ["placeholder", "input_1"], ["call_module", "_0"], ["call_module", "_1"],
        ["call_module", "_2"], ["output", "output"],
    ]  # fmt: skip


class Vocoder(nn.Module):
    """The inverse transform looks at the numbers of its window."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 10)
        self.register_buffer("window", torch.hann_window(8))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        spectrum = self.out(self.hidden(x).relu()).unflatten(-1, (5, 2)).transpose(1, 2)
        spectrum = torch.view_as_complex(spectrum.contiguous())
        return torch.istft(spectrum, n_fft=8, hop_length=2, window=self.window)


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(
            self.rnn(packed)[0], batch_first=True, total_length=x.shape[1]
        )[0]


class Recogniser(nn.Module):
    """No length of a sequence may be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.packs = nn.Linear(4, 6), Packs()
        self.hidden, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.out(self.hidden(self.packs(self.embed(x), lengths)).relu())


@pytest.mark.parametrize("kind", [Vocoder, Recogniser])
def test_what_cannot_be_run_on_shapes_alone_stays_as_it_is(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind().double()
    hidden: Any = net.get_submodule("hidden")
    with torch.no_grad():
        hidden.weight[:3] = hidden.bias[:3] = 0
    inputs = torch.randn(2, 9, 4, dtype=torch.float64), torch.tensor([9, 7])
    result = demp_fx.compile(net, inputs)
    assert result.module.get_submodule("hidden").out_features == 3
    torch.testing.assert_close(result.module(*inputs), net(*inputs), rtol=1e-12, atol=1e-12)


def test_a_scalar_that_scales_is_no_channel() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.scale = nn.Parameter(torch.tensor(0.7))
            self.register_buffer("embed_scale", torch.tensor(4.0))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b((self.a(x) * self.embed_scale).relu()) * self.scale
            return result

    torch.manual_seed(0)
    net = Scaled().double()
    with torch.no_grad():
        net.a.weight[:3] = net.a.bias[:3] = 0
    x = torch.randn(5, 4, dtype=torch.float64)
    narrow = demp_fx.compile(net, (x,)).module
    assert narrow.get_submodule("a").weight.shape == (3, 4)
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_of_a_recurrent_layer_the_input_gets_narrower(kind: type[nn.RNNBase]) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Linear(4, 6), kind(6, 5, num_layers=2, bidirectional=True)
            self.hidden, self.head = nn.Linear(10, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.hidden(self.rnn(self.embed(x).relu())[0]).relu())
            return result

    torch.manual_seed(0)
    net = Tagger().double()
    with torch.no_grad():
        for layer in (net.embed, net.hidden):
            layer.weight[:3] = 0
            layer.bias[:3] = torch.tensor([0.0, 0.5, -1.0])  # one constant for the RNN's biases
    x = torch.randn(7, 2, 4, dtype=torch.float64)
    result = demp_fx.compile(net, (x,))
    rnn = result.module.get_submodule("rnn")
    assert isinstance(rnn, kind)
    assert rnn.input_size == rnn.weight_ih_l0.shape[1] == rnn.weight_ih_l0_reverse.shape[1] == 3
    assert rnn.weight_hh_l0.shape[1] == rnn.hidden_size == 5
    assert result.module.get_submodule("embed").weight.shape == (3, 4)
    assert result.module.get_submodule("hidden").weight.shape == (5, 10)
    assert 0 < result.report.macs_after < result.report.macs_before
    longer = torch.randn(9, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(result.module(longer), net(longer), rtol=1e-12, atol=1e-12)
    result.module(x).sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())


@pytest.mark.parametrize("given", ["by place", "by name", "without a batch", "with a state"])
def test_of_a_long_sequence_a_recurrent_layer_is_looked_at_for_one_step(given: str) -> None:
    class Listener(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Linear(4, 6), nn.GRU(6, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x[0] if given == "without a batch" else x)
            if given == "with a state":
                return self.rnn(x, x.new_ones(1, x.shape[0], 5))[0]
            return self.rnn(input=x)[0] if given == "by name" else self.rnn(x)[0]

    torch.manual_seed(0)
    net = Listener().double()
    with torch.no_grad():
        net.embed.weight[:3] = net.embed.bias[:3] = 0
    x = torch.randn(2, 2000, 4, dtype=torch.float64)
    result = demp_fx.compile(net, x)
    assert result.module.get_submodule("rnn").input_size == 3
    assert result.report.seconds["analyze"] < 5
    torch.testing.assert_close(result.module(x), net(x), rtol=1e-12, atol=1e-12)


def test_a_parametrized_layer_is_not_touched_by_looking_at_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)
    )
    before = copy.deepcopy(net.state_dict())  # in train mode, each use of the weight moves it
    demp_fx.compile(net, torch.randn(4, 6))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# -- what is asked for, and what is said ---------------------------------------------------------


def test_a_parameter_keeps_its_class_and_what_was_noted_on_it() -> None:
    class Scale(nn.Parameter):
        pass

    model = Net().eval()
    silence(model.norm1, [0, 1, 2])
    model.conv1.weight.no_decay = True  # type: ignore[attr-defined]
    model.norm1.weight = Scale(model.norm1.weight.detach())
    module = demp_fx.compile(model, image(2, 3, 8, 8)).module
    weight, scale = module.get_parameter("conv1.weight"), module.get_parameter("norm1.weight")
    assert weight.shape[0] == 5
    assert weight.no_decay  # type: ignore[attr-defined]
    assert isinstance(scale, Scale)
    assert scale.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuts": "sometimes"}, "cuts: one of pays, always, never"),
        ({"round_to": 2.5}, "round_to: .* 2.5"),
        ({"optimizer": "adam"}, "one of torch.optim's"),
        ({"optimizer": torch.optim.SGD(Net().parameters(), 0.1)}, "it is of another one"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        demp_fx.compile(Net(), image(2, 3, 8, 8), **options)


def test_analysis_asks_for_a_traced_graph() -> None:
    with pytest.raises(UsageError, match=r"demp_fx\.trace"):
        demp_fx.analyze(Net())  # type: ignore[arg-type]


def test_a_model_without_parameters_is_not_sparse() -> None:
    report = demp_fx.compile(nn.ReLU(), image(2, 3)).report
    assert report.param_sparsity == report.channel_sparsity == 0.0


class TrainsOnly(Net):
    """Its forward refuses eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("for training only")
        return super().forward(x)


def test_a_report_goes_to_json_and_back(tmp_path: Path) -> None:
    report = demp_fx.compile(TrainsOnly().train(), image(2, 3, 8, 8)).report
    assert report.verification is not None
    assert report.verification.eval_error is None
    assert report.verification.errors.endswith("in train mode")
    assert demp_fx.CompileReport.from_json(report.to_json()) == report
    report.save(tmp_path / "report.json")
    assert demp_fx.CompileReport.load(tmp_path / "report.json") == report


@pytest.mark.parametrize("kind", [demp_fx.PruningPlan, demp_fx.CompileReport])
def test_what_is_no_plan_or_report_is_refused(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "other").write_text('{"version": 2}')
    for name in ("gone", "binary", "other"):
        with pytest.raises(UsageError):
            kind.load(tmp_path / name)


def test_passes_know_that_constants_are_rounded_to_single_precision() -> None:
    model = Net(padding=0, bias=True).to(torch.float32).eval()
    silence(model.norm1, [1, 4], shift=0.7)
    x = torch.randn(2, 3, 8, 8)
    graph = demp_fx.trace(model, x)
    plan = make_plan(graph)
    assert plan.rounds
    found = verify(model, narrow(graph, plan), x)
    assert found.eval_error is not None
    assert found.eval_error <= found.tolerance < 1e-5
