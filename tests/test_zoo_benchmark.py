"""The parts of `python -m benchmarks.zoo`: what is killed, what a hang costs, what a page says."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.killing import kill
from benchmarks.zoo.outputs import own_error, relative_error, trains
from benchmarks.zoo.runner import Task, run
from benchmarks.zoo.suites import SUITES
from benchmarks.zoo.table import is_exact, markdown, share, summary
from tests.zoo import oracle


class Attention(nn.Module):
    """Four heads of four dims over a packed projection, as most vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Attention()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return self.head(x + self.fc2(nn.functional.gelu(self.fc1(x))))


def block(constant: bool = False) -> tuple[nn.Module, dict[str, Tensor], tuple[Tensor]]:
    torch.manual_seed(0)
    model, inputs = Block().double(), (torch.randn(2, 7, 16, dtype=torch.float64),)
    return model, kill(model, inputs, constant=constant), inputs


def test_half_of_every_layer_dies_that_can() -> None:
    model, dead, _ = block()
    assert {name: len(indices) for name, indices in dead.items()} == {
        "norm": 8,
        "attention.qkv": 3 * (4 + 3 * 2),  # one head of four, and half of the others
        "fc1": 16,
    }
    assert not model.fc1.weight[dead["fc1"]].any()
    assert not model.fc1.bias[dead["fc1"]].any()
    assert not model.norm.bias[dead["norm"]].any()


def test_heads_lose_as_many_dims_each_and_queries_the_same_as_keys() -> None:
    model, _, _ = block()
    silent = (model.attention.qkv.weight == 0).all(dim=1).view(3, 4, 4)
    assert silent.sum(dim=2).tolist() == [[4, 2, 2, 2]] * 3
    assert torch.equal(silent[0], silent[1])
    assert not torch.equal(silent[0], silent[2])


def test_constant_channels_keep_their_shift() -> None:
    model, dead, _ = block(constant=True)
    assert bool(model.norm.bias[dead["norm"]].all())
    assert bool(model.fc1.bias[dead["fc1"]].all())
    assert not model.norm.weight[dead["norm"]].any()


def test_all_of_what_was_killed_is_removable() -> None:
    model, _, inputs = block()
    kept = oracle.removable(model, [inputs]).kept
    assert kept["attention.qkv.weight"] == 3 * 6 * 8
    assert kept["attention.proj.weight"] == 16 * 6
    assert (kept["fc1.weight"], kept["fc2.weight"]) == (16 * 16, 16 * 16)
    assert kept["head.weight"] == 5 * 16


def test_no_two_living_channels_are_alike() -> None:
    model, dead, _ = block()
    living = torch.ones(16, dtype=torch.bool)
    living[dead["norm"]] = False
    assert len(model.norm.weight[living].unique()) == 8


def test_the_zoo_is_whole() -> None:
    for suite in SUITES.values():
        assert len(set(suite.names())) == len(suite.names())
    assert len(SUITES["torchvision"].names()) == 80 + 6
    timm = SUITES["timm"].names()
    families = """convnext efficientnet mobilenetv4 repvgg hrnet densenet resnext res2net ghostnet
        mobilevit vovnet dla nfnet mixer deit swin coat levit xcit pvt cspresnet regnet fastvit
        edgenext poolformer resnest skresnet rexnet dpn"""
    assert [f for f in families.split() if not any(f in name for name in timm)] == []


# -- the runner ------------------------------------------------------------------------------------


def _honest(send: Callable[[dict[str, Any]], None]) -> None:
    send({"a": 1})
    send({"b": 2})


def _crashing(send: Callable[[dict[str, Any]], None]) -> None:
    send({"a": 1})
    os.kill(os.getpid(), signal.SIGKILL)


def _hanging(send: Callable[[dict[str, Any]], None]) -> None:
    send({"a": 1})
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_crash_and_a_hang_cost_their_own_rows_only(jobs: int) -> None:
    works = {"crash": _crashing, "hang": _hanging, "honest": _honest}
    found = dict(run([Task(key, work, limit=2.0) for key, work in works.items()], jobs))
    assert found == {
        "crash": {"a": 1, "error": "the process died: SIGKILL"},
        "hang": {"a": 1, "error": "not done after 2 s"},
        "honest": {"a": 1, "b": 2},
    }


# -- figures ---------------------------------------------------------------------------------------

GOOD = {"eval_error": 1e-15, "train_error": 1e-14, "backward": "", "removed": 99, "removable": 100}


@pytest.mark.parametrize(
    "change",
    [
        {"eval_error": 1e-6},
        {"eval_error": float("nan")},
        {"train_error": float("inf")},
        {"resized_error": "RuntimeError: shapes"},
        {"backward": "gradients that are not finite: ['a']"},
        {"refused": "VerificationError: differs"},
        {"error": "not done after 60 s"},
    ],
)
def test_exact_is_nothing_less(change: dict[str, Any]) -> None:
    assert is_exact(GOOD)
    assert not is_exact(GOOD | change)


def test_what_the_original_does_not_run_is_not_held_against_the_result() -> None:
    assert is_exact(GOOD | {"train_error": "the original: ValueError: one value per channel"})


def test_a_network_that_decides_by_sizes_is_held_to_the_size_it_was_traced_at() -> None:
    decided = {"resized_error": 0.01, "decided": ["traced: a.py:3: `if x > 3:` followed for ..."]}
    assert is_exact(GOOD | decided)
    assert not is_exact(GOOD | {"resized_error": 0.01, "decided": []})
    assert not is_exact(GOOD | decided | {"eval_error": 0.01})


def test_the_summary_counts() -> None:
    rows = [
        {"network": "a", "suite": "s", "deaths": "zero",
         "ours": GOOD | {"seconds": 1.0},
         "peer": {"eval_error": 0.0, "removed": 5, "seconds": 4.0}, "pruner": {"seconds": 8.0}},
        {"network": "b", "suite": "s", "deaths": "zero",
         "ours": GOOD | {"removed": 10, "seconds": 1.0, "pinned": ["norm mixes"]},
         "peer": {"eval_error": 0.5, "removed": 5, "seconds": 1.0}},
        {"network": "c", "suite": "s", "deaths": "zero",
         "ours": {"error": "TraceError: no"}, "peer": {"error": "not done after 9 s"}},
    ]  # fmt: skip
    text = " ".join(summary(rows))
    assert "3 networks: 2 traced, 2 exact, 1 with at least 98%" in text
    assert "2 give a network that runs, 1 an exact one" in text
    assert (
        "Torch-Pruning's cutting alone, of channels that are given, geometric mean over 2 networks"
        in text
    )
    assert "2 networks that both give: 0.50" in text
    assert "1 networks that both give: 0.1" in text
    page = markdown(rows, ["about"])
    assert "**b, zero**: stays: norm mixes" in page
    assert "**c, zero**: error: TraceError: no" in page
    assert share(rows[1]) == 0.1


def test_errors_are_relative_and_of_equal_shapes_only() -> None:
    a = [torch.tensor([0.0, 100.0])]
    assert relative_error([torch.tensor([1.0, 100.0])], a) == pytest.approx(0.01)
    assert relative_error([torch.zeros(3)], a) == float("inf")
    assert relative_error([], a) == float("inf")


@torch.no_grad()
def test_dice_show_in_the_models_own_error() -> None:
    x = (torch.randn(8, 4, dtype=torch.float64),)
    steady, dice = nn.Linear(4, 4).double(), nn.Dropout(0.5)
    assert own_error(steady, x, [steady(x[0])]) < 1e-12
    assert own_error(dice, x, [dice(x[0])]) > 0.1


def test_training_must_give_finite_gradients() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.sqrt()

    x = (torch.ones(2, 4),)
    assert trains(nn.Linear(4, 4), x) == ""
    assert trains(Root(), x) != ""
