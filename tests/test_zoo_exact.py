"""Real networks with half of their channels dead: the narrow module computes the same function,
and everything that can go has gone (at least 98 % of what the oracle allows at most)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import demp_fx
from tests.zoo import oracle
from tests.zoo.kill import kill_channels, kill_norms, never_fire, relative_error, without_chance
from tests.zoo.networks import NETWORKS, WITH_AUXILIARY_HEADS, Network, build
from tests.zoo.shim import torchvision

EVAL_ERROR = 1e-10
TRAIN_ERROR = 1e-9  # batch statistics of 1x1 maps amplify the last digit
OF_THE_REMOVABLE = 0.98

WITHOUT_NORMS = {"alexnet", "squeezenet1_1"}


def _cases(names: list[str]) -> list[object]:
    return [
        pytest.param(name, marks=pytest.mark.slow) if NETWORKS[name].heavy else name
        for name in names
    ]


def _half_dead(network: Network, keep_shift: bool = False) -> nn.Module:
    model = without_chance(build(network)).eval()
    kill_norms(model, fraction=0.5, seed=0, keep_shift=keep_shift)
    return model


def _outputs(model: nn.Module, x: Tensor, train: bool) -> Tensor:
    """What it gives in a mode, leaving the model as it was."""
    with torch.no_grad():
        return copy.deepcopy(model).train(train)(x)


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _assert_trains(narrow: nn.Module, x: Tensor) -> None:
    """A backward pass reaches every parameter with finite numbers."""
    narrow.train()
    narrow(x).square().mean().backward()
    broken = [
        name
        for name, p in narrow.named_parameters()
        if p.grad is None or not bool(p.grad.isfinite().all())
    ]
    assert broken == []


@pytest.mark.parametrize("keep_shift", [False, True], ids=["zero", "constant"])
@pytest.mark.parametrize("name", _cases([n for n in NETWORKS if n not in WITHOUT_NORMS]))
def test_half_of_the_channels_dead_are_cut_out_exactly(name: str, keep_shift: bool) -> None:
    network = NETWORKS[name]
    model = _half_dead(network, keep_shift)
    bound = oracle.removable(model, [network.example(batch=4), network.fresh(batch=2)])

    result = demp_fx.compile(model, network.example())

    narrow, x = result.module, network.fresh()
    assert relative_error(_outputs(narrow, x, False), _outputs(model, x, False)) <= EVAL_ERROR
    assert relative_error(_outputs(narrow, x, True), _outputs(model, x, True)) <= TRAIN_ERROR
    assert list(narrow.state_dict()) == list(model.state_dict())
    _assert_trains(narrow, x)
    removed = _params(model) - _params(narrow)
    assert removed >= OF_THE_REMOVABLE * bound.removable
    assert (result.report.params_before, result.report.params_after) == (
        _params(model),
        _params(narrow),
    )


@pytest.mark.parametrize("name", list(WITH_AUXILIARY_HEADS))
def test_auxiliary_heads_of_train_mode_do_not_keep_the_trunk_wide(name: str) -> None:
    network, plain = WITH_AUXILIARY_HEADS[name], _half_dead(NETWORKS[name])
    model = without_chance(build(network)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)

    narrow = demp_fx.compile(model, network.example()).module

    x = network.fresh()
    assert relative_error(_outputs(narrow, x, False), _outputs(model, x, False)) <= EVAL_ERROR
    trunk = demp_fx.compile(plain, network.example()).module.state_dict()
    shapes = {key: value.shape for key, value in narrow.state_dict().items() if key in trunk}
    assert shapes == {key: value.shape for key, value in trunk.items()}


SILENT = {
    "alexnet": [f"features.{i}" for i in (0, 3, 6, 8, 10)] + ["classifier.1", "classifier.4"],
    "squeezenet1_1": ["features.0"]
    + [
        f"features.{i}.{part}"
        for i in (3, 4, 6, 7, 9, 10, 11, 12)
        for part in ("squeeze", "expand1x1", "expand3x3")
    ],
    "resnet18": [f"layer{i}.{j}.bn1" for i in range(1, 5) for j in range(2)],
}
"""Layers in front of a ReLU, by network."""


def _with_silent_channels(name: str) -> nn.Module:
    """Half of them never fire. All logits do (squeezenet1_1 has a ReLU behind them): they stay."""
    model = without_chance(build(NETWORKS[name]))
    never_fire(model, SILENT[name], fraction=0.5, seed=0)
    logits = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1]
    nn.init.ones_(logits.bias)
    return model


@pytest.mark.parametrize("train", [False, True], ids=["in-eval", "in-training"])
@pytest.mark.parametrize("name", _cases(list(SILENT)))
def test_what_never_fires_on_the_calibration_data_goes_too(name: str, train: bool) -> None:
    """All of it, also where a cut costs more time than it saves (`cuts="always"`)."""
    network = NETWORKS[name]
    model = _with_silent_channels(name).train(train)
    calibration = [network.example(batch=4) for _ in range(2)]
    bound = oracle.removable(model, calibration, observed=True, in_training=train)

    result = demp_fx.compile(model, network.example(), calibration=calibration, cuts="always")

    for x in calibration:
        error = relative_error(_outputs(result.module, x, False), _outputs(model, x, False))
        assert error <= EVAL_ERROR
        if train:  # batch statistics wake channels; for a model in eval mode nobody looked
            error = relative_error(_outputs(result.module, x, True), _outputs(model, x, True))
            assert error <= TRAIN_ERROR
    removed = _params(model) - _params(result.module)
    assert removed >= OF_THE_REMOVABLE * bound.removable
    assert result.report.dead_observed > 0


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
def test_without_calibration_data_nothing_is_taken_for_dead(name: str) -> None:
    network = NETWORKS[name]
    model = _with_silent_channels(name)

    result = demp_fx.compile(model, network.example())

    assert _params(result.module) == _params(model)


def test_a_channel_dead_in_one_branch_stays_in_the_stream() -> None:
    network = NETWORKS["resnet18"]
    model = build(network).eval()
    kill_channels(model, {"layer1.0.bn2": torch.arange(0, 64, 2)})

    narrow = demp_fx.compile(model, network.example()).module

    assert narrow.get_submodule("layer1.0.conv2").weight.shape == (32, 64, 3, 3)
    assert narrow.get_submodule("layer1.1.conv1").weight.shape == (64, 64, 3, 3)
    x = network.fresh()
    assert relative_error(_outputs(narrow, x, False), _outputs(model, x, False)) <= EVAL_ERROR


def test_a_channel_dead_in_the_whole_stream_leaves_it() -> None:
    network, half = NETWORKS["resnet18"], torch.arange(0, 64, 2)
    model = build(network).eval()
    kill_channels(model, dict.fromkeys(["bn1", "layer1.0.bn2", "layer1.1.bn2"], half))

    narrow = demp_fx.compile(model, network.example()).module

    assert narrow.get_submodule("conv1").weight.shape == (32, 3, 7, 7)
    assert narrow.get_submodule("layer1.1.conv1").weight.shape == (64, 32, 3, 3)
    assert narrow.get_submodule("layer1.1.conv2").weight.shape == (32, 64, 3, 3)
    assert narrow.get_submodule("layer2.0.downsample.0").weight.shape == (128, 32, 1, 1)


def test_dropout_and_stochastic_depth_go_on() -> None:
    network = NETWORKS["efficientnet_b0"]
    model = build(network).eval()
    kill_norms(model, fraction=0.5, seed=0)

    narrow = demp_fx.compile(model, network.example()).module

    x = network.fresh()
    assert relative_error(_outputs(narrow, x, False), _outputs(model, x, False)) <= EVAL_ERROR
    assert not torch.equal(_outputs(narrow, x, True), _outputs(narrow, x, True))


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v2"])
def handed_out(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """A narrow module (with gathers, scatters and carriers), an input, and what it should give."""
    network = NETWORKS[request.param]
    model = _half_dead(network, keep_shift=True)
    x = network.fresh()
    return demp_fx.compile(model, network.example()).module, x, _outputs(model, x, False)


def test_a_copy_computes_the_same(handed_out: tuple[nn.Module, Tensor, Tensor]) -> None:
    narrow, x, expected = handed_out
    assert relative_error(copy.deepcopy(narrow)(x), expected) <= EVAL_ERROR


def test_it_survives_pickling(handed_out: tuple[nn.Module, Tensor, Tensor]) -> None:
    narrow, x, expected = handed_out
    revived = pickle.loads(pickle.dumps(narrow))
    assert relative_error(revived(x), expected) <= EVAL_ERROR
    assert list(revived.state_dict()) == list(narrow.state_dict())


def test_its_state_goes_round(handed_out: tuple[nn.Module, Tensor, Tensor]) -> None:
    narrow, x, expected = handed_out
    blank = copy.deepcopy(narrow)
    for p in blank.parameters():
        nn.init.zeros_(p)
    blank.load_state_dict(narrow.state_dict())
    assert relative_error(blank(x), expected) <= EVAL_ERROR


def test_torch_compile_runs_it(handed_out: tuple[nn.Module, Tensor, Tensor]) -> None:
    narrow, x, expected = handed_out
    torch.compiler.reset()
    compiled = torch.compile(narrow, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), expected) <= EVAL_ERROR


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jit.script_method.*:DeprecationWarning")  # torch's own
def test_inductor_compiles_a_sum_of_unequal_widths() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet.BasicBlock(8, 8).double().eval()
    kill_norms(model, fraction=0.5, seed=0, keep_shift=True)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    narrow = demp_fx.compile(model, x, cuts="always").module
    assert len(narrow.get_parameter("bn2.weight")) == 4  # added to a stream of 8

    torch.compiler.reset()
    compiled = torch.compile(narrow, fullgraph=True)

    assert relative_error(compiled(x), model(x)) <= EVAL_ERROR
