"""Checkpoints: whole or not at all, damage is noticed, a full disk loses nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from demp_fx.training import checkpoint as module
from demp_fx.training.checkpoint import Checkpoint, load, newest, save


def example(step: int = 7) -> Checkpoint:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(3)}
    return Checkpoint(step, weights, {"x": [1, "two"]}, {"lr": 0.1, "m": torch.ones(2)})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    back = load(save(example(), tmp_path))
    assert back.step == 7
    assert back.state == {"x": [1, "two"]}
    assert torch.equal(back.weights["a.weight"], example().weights["a.weight"])
    assert torch.equal(back.optimizer["m"], torch.ones(2))


def test_the_last_two_are_kept_and_drafts_of_the_killed_go(tmp_path: Path) -> None:
    (tmp_path / ".draft-left").mkdir(parents=True)
    for step in (1, 2, 3):
        save(example(step), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(example(), tmp_path)
    again = example()
    again.state = {"x": "new"}
    assert load(save(again, tmp_path)).state == {"x": "new"}


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_noticed_and_the_one_before_is_taken(
    name: str, damage: str, tmp_path: Path
) -> None:
    save(example(1), tmp_path)
    path = save(example(2), tmp_path) / name
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    told: list[str] = []
    found = newest(tmp_path, told.append)
    assert found is not None
    assert found.step == 1
    assert "step-00000002 is damaged" in told[0]


def test_without_a_whole_one_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path, print) is None
    (tmp_path / "step-00000004").mkdir()
    assert newest(tmp_path, lambda text: None) is None


@pytest.mark.parametrize("failing", ["save_file", "fsync", "rename"])
def test_a_full_disk_leaves_the_one_before(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(example(1), tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"save_file": module, "fsync": module.os, "rename": Path}[failing]
    monkeypatch.setattr(target, failing, full)
    with pytest.raises(OSError, match="No space left"):
        save(example(2), tmp_path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load(tmp_path / "step-00000001").step == 1


def test_nothing_in_it_runs_code(tmp_path: Path) -> None:
    bad = example()
    bad.optimizer = {"x": Path("anything")}
    path = save(bad, tmp_path)
    with pytest.raises(ValueError, match="UnpicklingError"):
        load(path)
