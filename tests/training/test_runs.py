"""Runs: from a recipe to a folder; interrupted, killed, resumed; and all that can be wrong."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import nn

from demp_fx.cli import main
from demp_fx.errors import UsageError
from demp_fx.training import runs as runs_file
from demp_fx.training.batches import pipelines
from demp_fx.training.config import RunConfig
from demp_fx.training.datasets import load_data
from demp_fx.training.metrics import Metrics, read
from demp_fx.training.runs import Run
from demp_fx.training.setup import rate
from tests.training.tiny import RECIPE, Tiny

ROOT = Path(__file__).parents[2]


def recipe(**changes: Any) -> dict[str, Any]:
    data = copy.deepcopy(RECIPE)
    for key, value in changes.items():
        *path, last = key.split("__")
        place: Any = data
        for part in path:
            place = place[part]
        place[last] = value
    return data


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(recipe(**changes)))
    return path


def go(folder: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    run = Run(RunConfig.from_dict(recipe(**changes)), folder, resume=resume, say=lambda text: None)
    return run.go()


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without the wall-clock."""
    clocks = ("seconds", "cpu_seconds", "step_seconds", "test_seconds", "seconds_pruning")
    return [{k: v for k, v in r.items() if k not in clocks} for r in read(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from beginning to end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert go(folder)["steps"] == 36
    return folder


def test_the_folder_of_a_run(whole: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    assert result["after"]["channels"] < result["before"]["channels"]
    assert result["failures"] == 0
    assert result["checks"] == 9  # every five steps, at the start and at the end
    weights = load_file(whole / "narrow" / "weights.safetensors")
    assert weights["bn1.weight"].numel() == result["widths"]["relu"][1] < 12
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"step-00000032", "step-00000036"}
    assert RunConfig.from_yaml(whole / "recipe.yaml") == RunConfig.from_dict(recipe())


def test_metrics_tell_the_story(whole: Path) -> None:
    records = read(whole)
    assert [r["step"] for r in records if r["kind"] == "epoch"] == [6, 12, 18, 24, 30, 36]
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(2, 37, 2))
    events = [r for r in records if r["kind"] == "event"]
    assert [e["step"] for e in events] == [0, 5, 10, 15, 20, 25, 30, 35, 36]
    assert records[-1]["kind"] == "end"
    last = [r for r in records if r["kind"] == "epoch"][-1]
    assert last["test_accuracy"] > 0.6  # a third by chance


def test_the_result_computes_what_the_run_tested(whole: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    space: dict[str, Any] = {"__name__": "m", "__file__": str(whole / "narrow" / "module.py")}
    exec((whole / "narrow" / "module.py").read_text(), space)
    module = space["load"](whole / "narrow").eval()
    config = RunConfig.from_dict(recipe())
    _, test = pipelines(config.data, *load_data(config.data), 1, 0, torch.device("cpu"))
    x, y = test.plain(torch.arange(30))
    accuracy = float((module(x).argmax(1) == y).float().mean())
    assert accuracy == pytest.approx(result["test_accuracy"])


def test_the_report_stands_on_its_own(whole: Path) -> None:
    result = invoke("report", whole)
    assert result.exit_code == 0, result.output
    page = (whole / "report.html").read_text()
    assert page.count("<svg") == 5
    for title in ("Channels that died", "Loss and accuracy", "Work and time", "Channels by layer"):
        assert title in page
    events = [r for r in read(whole) if r["kind"] == "event" and r["removed"]]
    assert f"before and after {len(events)} narrowings agree in float64" in page
    assert "What was assumed" in page
    assert "never fired on the" in page
    assert "src=" not in page
    assert "channels" in result.stdout
    assert "wrote" not in result.stdout


def test_tensorboard_gets_the_metrics(whole: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    assert [s.step for s in board.Scalars("epoch/test_accuracy")] == [6, 12, 18, 24, 30, 36]


# -- resuming -------------------------------------------------------------------------------------


def assert_same_run(folder: Path, whole: Path) -> None:
    ours, theirs = (load_file(f / "narrow" / "weights.safetensors") for f in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    assert numbers(folder) == numbers(whole)


def start(path: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "demp_fx.cli", "train", str(path), "--out", str(folder), *more]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def wait_for(check: Any, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while not check() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_killed_run_goes_on_to_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    """Killed twice, right after some checkpoint appears."""
    path, folder = write(tmp_path / "recipe.yaml"), tmp_path / "run"
    for step, more in ((4, ()), (24, ("--resume",))):
        process = start(path, folder, *more)
        target = folder / "checkpoints" / f"step-{step:08d}"
        wait_for(target.exists, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    go(folder, resume=True)
    assert_same_run(folder, whole)


@pytest.mark.long
def test_killed_at_any_moment(whole: Path, tmp_path: Path) -> None:
    """At random moments, writing of checkpoints and of the result included."""
    path, folder = write(tmp_path / "recipe.yaml"), tmp_path / "run"
    moments = torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist()
    for moment in moments:
        process = start(path, folder, *(("--resume",) if folder.exists() else ()))
        recipe_there = (folder / "recipe.yaml").exists
        wait_for(recipe_there, process)
        time.sleep(2.0 + 2.5 * moment)
        process.kill()
        process.communicate()
    process = start(path, folder, "--resume")
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert_same_run(folder, whole)


def test_ctrl_c_leaves_a_checkpoint(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = write(tmp_path / "recipe.yaml", checkpoint_every=1000)
    process = start(path, folder)
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors.decode()
    assert b"--resume goes on" in errors
    assert len(list((folder / "checkpoints").iterdir())) == 1
    go(folder, resume=True, checkpoint_every=1000)
    assert_same_run(folder, whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    go(folder)
    (folder / "checkpoints" / "step-00000036" / "state.json").write_text("{}")
    told: list[str] = []
    run = Run(RunConfig.from_dict(recipe()), folder, resume=True, say=told.append)
    assert run.trainer.step == 32
    assert any("step-00000036 is damaged" in line for line in told)
    run.go()
    assert_same_run(folder, whole)


def test_averaged_weights_and_accumulation_are_resumed_too(tmp_path: Path) -> None:
    changes = {"ema": 0.9, "accumulate": 2, "epochs": 3, "schedule__name": "onecycle"}
    first, second = tmp_path / "a", tmp_path / "b"
    go(first, **changes)
    run = Run(RunConfig.from_dict(recipe(**changes)), second, say=lambda text: None)
    stop_at(run, 9)
    with pytest.raises(runs_file.InterruptedRun):
        run.go()
    go(second, resume=True, **changes)
    assert_same_run(second, first)


def stop_at(run: Run, step: int) -> None:
    original = run.after_step

    def after_step(done: int) -> bool:
        run.stop = done == step
        return original(done)

    run.after_step = after_step  # type: ignore[method-assign]


def test_another_recipe_is_not_resumed(whole: Path) -> None:
    with pytest.raises(UsageError, match="is not the recipe given"):
        Run(RunConfig.from_dict(recipe(seed=5)), whole, resume=True)


def test_a_folder_with_a_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    folder, path = tmp_path / "run", write(tmp_path / "r.yaml", epochs=1)
    assert invoke("train", path, "--out", folder, "--quiet").exit_code == 0
    refused = invoke("train", path, "--out", folder, "--quiet")
    assert refused.exit_code == 2
    assert "--resume goes on" in refused.stderr
    assert invoke("train", path, "--out", folder, "--quiet", "--overwrite").exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    result = invoke("train", path, "--out", tmp_path / "mine", "--quiet", "--overwrite")
    assert result.exit_code == 2
    assert (tmp_path / "mine" / "thesis.tex").exists()


# -- dense runs, precision ------------------------------------------------------------------------


def test_without_a_demon_the_dense_network_is_trained(tmp_path: Path) -> None:
    figures = go(tmp_path / "run", demon=None, epochs=2)
    assert "before" not in figures
    assert figures["steps"] == 12
    result = invoke("report", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "report.html").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, {"channels_last": True}, {"clip": 1.0, "label_smoothing": 0.1},
     {"optimizer": {"name": "sgd", "lr": 0.1, "nesterov": True}, "demon__penalty": 0.05}],
)  # fmt: skip
def test_other_ways_to_train(changes: dict[str, Any], tmp_path: Path) -> None:
    figures = go(tmp_path / "run", **changes)
    assert figures["failures"] == 0
    assert figures["after"]["channels"] < figures["before"]["channels"]
    assert figures["test_accuracy"] > 0.6


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_a_compiled_module_is_compiled_anew_after_a_narrowing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: compile_(m, backend="eager", fullgraph=True))
    figures = go(tmp_path / "run", compile=True)
    assert figures["after"]["channels"] < figures["before"]["channels"]
    assert figures["failures"] == 0
    records = read(tmp_path / "run")
    narrowed = {r["step"] for r in records if r["kind"] == "event" and r["removed"]} - {36}
    compiled = [r for r in records if r["kind"] == "compile"]
    assert {r["step"] for r in compiled} == {step + 1 for step in narrowed - {0}}
    assert sum(r["seconds"] for r in compiled) > 0


def test_weight_decay_of_sgd_is_decoupled(tmp_path: Path) -> None:
    """A step without a gradient shrinks by lr * decay, momentum or not."""
    config = RunConfig.from_dict(
        recipe(demon=None, optimizer={"name": "sgd", "lr": 0.5, "weight_decay": 0.1})
    )
    trainer = Run(config, tmp_path / "run", say=lambda text: None).trainer
    before = trainer.module.get_parameter("conv1.weight").detach().clone()
    trainer._decay()
    assert torch.allclose(trainer.module.get_parameter("conv1.weight"), before * 0.95)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant"}, {0: 1.0, 99: 1.0}),
        ({"name": "step", "every": 31, "factor": 0.2}, {0: 1.0, 30: 1.0, 31: 0.2, 62: 0.04}),
        ({"name": "step", "every": "50%", "factor": 0.1}, {49: 1.0, 50: 0.1}),
        ({"name": "cosine"}, {0: 1.0, 50: 0.5}),
        ({"name": "cosine", "warmup": 10}, {0: 0.1, 9: 1.0, 55: 0.5}),
        ({"name": "onecycle"}, {0: 1 / 25, 30: 1.0, 65: 0.5}),
    ],
)
def test_learning_rates(schedule: dict[str, Any], expected: dict[int, float]) -> None:
    from demp_fx.training.config import ScheduleConfig

    config = ScheduleConfig.from_dict(schedule)
    for step, factor in expected.items():
        assert rate(config, step, 100) == pytest.approx(factor, abs=1e-9)


# -- what can be wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demon__penalty": -1}, "demon.penalty"),
        ({"epochs": 0}, "epochs"),
        ({"optimizer__name": "lion"}, "optimizer.name"),
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"data": {"kind": "images"}}, "data"),
        ({"demon__accumulate": 4}, "accumulate"),
        ({"model": "tests.training.tiny:nothing"}, "has no `nothing`"),
        ({"model": "no_such_file.py"}, "there is no file"),
        ({"device": "cuda:17"}, "device"),
        (
            {"data": {"kind": "digits"}, "model": "tests.training.tiny:grey"},
            "3 outputs, the data has label 9",
        ),
        ({"model": "tests.training.nets:Plain"}, "the model does not take the images"),
        (
            {"data": {"kind": "factory", "factory": "tests.training.test_runs:not_pairs"}},
            "data.factory: taking images and labels failed",
        ),
    ],
)
def test_bad_recipes_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", **changes)
    result = invoke("train", path, "--out", tmp_path / "run", "--quiet")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_bad_recipe_takes_nothing_from_an_earlier_run(tmp_path: Path) -> None:
    folder, path = tmp_path / "run", write(tmp_path / "r.yaml", epochs=1)
    assert invoke("train", path, "--out", folder, "--quiet").exit_code == 0
    before = sorted(folder.rglob("*"))
    worse = write(tmp_path / "worse.yaml", model="gone.py")
    assert invoke("train", worse, "--out", folder, "--quiet", "--overwrite").exit_code == 2
    assert sorted(folder.rglob("*")) == before
    assert invoke("train", path, "--out", folder, "--quiet", "--resume").exit_code == 0


def not_pairs() -> tuple[list[int], list[int]]:
    """No datasets of (image, label)."""
    return [1, 2], [3]


def broken() -> nn.Module:
    """Diverges at once."""
    model = Tiny()
    with torch.no_grad():
        model.head.weight.fill_(1e38)
    return model


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", model="tests.training.test_runs:broken")
    result = invoke("train", path, "--out", tmp_path / "run", "--quiet")
    assert result.exit_code == 6, result.output
    assert "diverged" in result.stderr
    assert "step 1" in result.stderr


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    told: list[str] = []
    run = Run(RunConfig.from_dict(recipe()), tmp_path / "run", say=told.append)
    with monkeypatch.context() as patch:
        patch.setattr(runs_file, "save", full)
        run.go()
    assert any("no checkpoint of step 4" in line and "No space left" in line for line in told)
    assert_same_run(tmp_path / "run", whole)


class OnAFullDisk(Metrics):
    """Metrics whose file takes nothing."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, board=False)
        self.file.close()
        self.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115


def test_metrics_that_cannot_be_written_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    run = Run(RunConfig.from_dict(recipe(epochs=1)), tmp_path / "run", say=told.append)
    monkeypatch.setattr(runs_file, "Metrics", OnAFullDisk)
    run.go()
    assert sum("metrics cannot be written" in line for line in told) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = write(tmp_path / "r.yaml")
    result = invoke("train", path, "--out", tmp_path / "file" / "run", "--quiet")
    assert result.exit_code == 5, result.output


def test_report_of_what_is_no_run(tmp_path: Path) -> None:
    assert invoke("report", tmp_path).exit_code == 2
    assert os.listdir(tmp_path) == []
