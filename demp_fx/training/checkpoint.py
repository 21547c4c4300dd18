"""Checkpoints: a folder that appears whole or not at all, and says so if it has been damaged.

step-00001200/weights.safetensors   of the module, and of the average under "ema/"
              state.json            where the run is, and what the demon has done
              optimizer.pt          optimizer, scaler, random state: tensors and plain data
              manifest.json         the digest of each
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, STATE, OPTIMIZER, MANIFEST = (
    "weights.safetensors", "state.json", "optimizer.pt", "manifest.json",
)  # fmt: skip
_KEEP = 2  # the last one, and one to fall back on


@dataclass
class Checkpoint:
    """`weights`: tensors by name. `state`: JSON data. `optimizer`: plain data and tensors."""

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    optimizer: dict[str, Any]


def save(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write under `folder`; older ones go, but for the one before. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".draft-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
    target = folder / f"step-{checkpoint.step:08d}"
    try:
        # named tensors may share memory (tied weights), which safetensors does not store
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in checkpoint.weights.items()}
        writers: dict[str, Callable[[Path], object]] = {
            WEIGHTS: lambda path: save_file(weights, path),
            STATE: lambda path: path.write_text(json.dumps(checkpoint.state)),
            OPTIMIZER: lambda path: torch.save(checkpoint.optimizer, path),
        }
        digests = {}
        for name, write in writers.items():
            _write(draft / name, write)
            digests[name] = _digest(draft / name)
        _write(draft / MANIFEST, lambda path: path.write_text(json.dumps(digests)))
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
        _sync(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; `say` is told of every one that is not."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load(path)
        except ValueError as error:
            say(f"warning: the checkpoint {path} is damaged ({error}); trying the one before")
    return None


def load(path: Path) -> Checkpoint:
    """Read one. Raises `ValueError` where it is damaged."""
    try:
        digests = json.loads((path / MANIFEST).read_text())
        for name in (WEIGHTS, STATE, OPTIMIZER):
            if _digest(path / name) != digests[name]:
                raise ValueError(f"{name} is not what was written")
        return Checkpoint(
            step=int(path.name.removeprefix("step-")),
            weights=load_file(path / WEIGHTS),
            state=json.loads((path / STATE).read_text()),
            optimizer=torch.load(path / OPTIMIZER, weights_only=True),
        )
    except (
        OSError, KeyError, TypeError, SafetensorError, RuntimeError, pickle.UnpicklingError
    ) as error:  # fmt: skip
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, and wait until it is on the disk."""
    try:
        write(path)
    except (SafetensorError, RuntimeError) as error:  # how both libraries pass on a full disk
        raise OSError(f"{path.name}: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
