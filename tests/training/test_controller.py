"""The controller: how the penalty follows, and that runs land on their target, or say they do not.

More networks and targets: `pytest -m long`, and `python -m benchmarks.controller`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import demp_fx
from demp_fx.recipe import Recipe
from demp_fx.report import run as report
from demp_fx.training.choose import Choice
from demp_fx.training.config import RunConfig
from demp_fx.training.controller import Controller
from demp_fx.training.deaths import Dead
from demp_fx.training.metrics import read
from demp_fx.training.runs import Run
from tests.training.nets import Plain, batch, probes

DIGITS: dict[str, Any] = {
    "model": "examples/digits.py:MLP",
    "data": {"kind": "digits"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "schedule": {"name": "onecycle"},
    "batch": 64,
    "epochs": 30,
    "threads": 1,
    "device": "cpu",
    "probe": {"batches": 2, "size": 256},
}
NETWORKS: dict[str, tuple[str, dict[str, float]]] = {
    "resnet": ("examples/digits.py:ResNet", {"penalty": 1e-2, "noise_std": 1e-2}),
    "vgg": ("examples/vgg.py:for_digits", {"penalty": 1e-2, "noise_std": 1e-2}),
    "mlp": ("examples/digits.py:MLP", {"penalty": 2e-2, "noise_std": 1e-2}),
}


def controller(**changes: Any) -> Controller:
    return Controller(**{"measure": "macs", "share": 0.4, "span": 1000, "penalty": 0.01, **changes})


def test_the_reference_falls_from_dense_to_target() -> None:
    control = controller()
    found = [control.reference(step) for step in (0, 100, 350, 600, 1000)]
    assert found == pytest.approx([1.0, 1.0, 0.7, 0.4, 0.4])


def test_the_penalty_grows_while_nothing_dies_and_stays_below_its_ceiling() -> None:
    control, before = controller(), 0.01
    for step in range(100, 1000, 50):
        control.observe(step, 1.0, 50)
        assert before <= control.penalty <= 0.05
        before = control.penalty
    assert control.penalty == pytest.approx(0.05)


def test_it_falls_where_too_many_die_but_not_out_of_reach() -> None:
    control = controller()
    control.observe(100, 0.6, 50)
    assert control.penalty < 0.01
    for step in range(150, 400, 50):
        control.observe(step, 0.6, 50)
    assert control.penalty == pytest.approx(0.01 / 3)


def test_at_the_target_there_is_no_pressure_any_more() -> None:
    control = controller()
    control.observe(300, 0.401, 50)
    assert control.reached
    assert control.penalty == 0.0
    control.observe(350, 0.401, 50)
    assert control.penalty == 0.0


def test_after_the_span_the_network_is_left_alone() -> None:
    control = controller()
    control.observe(950, 0.6, 50)
    assert control.penalty > 0
    control.observe(1000, 0.6, 50)
    assert control.penalty == 0.0
    assert not control.reached


@pytest.mark.parametrize("speed", [1.0, 3.0, 10.0, 30.0])
def test_it_finds_the_penalty_of_networks_that_differ_thirtyfold(speed: float) -> None:
    """A network of which a share dies that follows the penalty, with a delay of two checks."""
    control, left, before = controller(span=2000), 1.0, [0.0, 0.0]
    for step in range(0, 2000, 50):
        left = max(0.0, left - min(0.15, speed * before[-2]) * left)
        if not control.reached:
            left = max(left, control.share) if left < control.share else left
        control.observe(step, left, 50)
        before.append(control.penalty)
        if control.reached:
            break
    assert control.reached
    assert abs(left / control.share - 1) < 0.05


def test_the_verdict_says_whether_it_was_reached() -> None:
    assert "reached, 40.80%" in controller().verdict(0.408)
    assert "not reached in 1000 steps, 55.00% are left" in controller().verdict(0.55)


def demon_with(dead: list[int], **options: Any) -> tuple[demp_fx.Demon, Choice]:
    recipe = Recipe(span=10, prune_at_start=False, cuts="always", **options)
    demon = demp_fx.Demon(Plain(), None, batch(0)[0], recipe, probes())
    found = {}
    for layer in demon.now.layers:
        mask = torch.zeros(layer.width, dtype=torch.bool)
        if layer.node == "act":
            mask[dead] = True
        found[layer.node] = Dead(mask, torch.zeros(layer.width))
    return demon, Choice(demon.dense, demon.now, found, recipe, demon.module)


def test_no_more_go_than_the_target_allows() -> None:
    demon, choice = demon_with([0, 1, 2, 3, 4, 5])
    assert demon.dense.share(choice.all(), "channels") == pytest.approx(8 / 14)
    down = choice.down_to("channels", 11 / 14)
    assert demon.dense.share(down, "channels") == pytest.approx(11 / 14)


def test_the_least_go_first() -> None:
    demon = demp_fx.Demon(Plain(), None, batch(0)[0], Recipe(prune_at_start=False), probes())
    with torch.no_grad():
        demon.module.get_parameter("bn1.weight")[:] = torch.linspace(1.0, 0.2, 8)
    found = {n.node: Dead(torch.ones(n.width, dtype=torch.bool) & (n.node == "act"),
                          torch.zeros(n.width)) for n in demon.now.layers}  # fmt: skip
    choice = Choice(demon.dense, demon.now, found, demon.recipe, demon.module)
    assert choice.first(3).gone["act"].mask.nonzero().reshape(-1).tolist() == [5, 6, 7]


def run(
    folder: Path, model: str, pressure: dict[str, float], target: dict[str, float]
) -> dict[str, Any]:
    demon = {**pressure, "span": "80%", "prune_every": 22, "target": target}
    config = RunConfig.from_dict({**DIGITS, "model": model, "demon": demon})
    return Run(config, folder, say=lambda text: None).go()


def test_a_run_lands_on_its_target_and_goes_on_well(tmp_path: Path) -> None:
    figures = run(tmp_path / "run", *NETWORKS["mlp"], {"channels": 0.6})
    assert figures["after"]["channels"] / figures["before"]["channels"] == pytest.approx(
        0.6, rel=0.05
    )
    assert "reached" in figures["target"]
    assert "not reached" not in figures["target"]
    assert figures["test_accuracy"] > 0.95
    events = [r for r in read(tmp_path / "run") if r["kind"] == "event"]
    assert events[0]["aim"] == 1.0
    assert events[-1]["aim"] == pytest.approx(0.6)
    assert events[-1]["penalty"] == 0.0
    page = report.write(report.RunRecords(tmp_path / "run")).read_text()
    assert "The way to the target" in page
    assert "channels at 60.0% of the dense network: reached" in page


@pytest.mark.long
@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize(("measure", "share"), [("macs", 0.35), ("params", 0.2)])
def test_within_five_percent_or_says_that_it_cannot(
    name: str, measure: str, share: float, tmp_path: Path
) -> None:
    figures = run(tmp_path / "run", *NETWORKS[name], {measure: share})
    left = figures["after"][measure] / figures["before"][measure]
    assert ("not reached" in figures["target"]) == (abs(left / share - 1) > 0.05)
    assert figures["test_accuracy"] > 0.94
