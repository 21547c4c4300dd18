"""The output folder: module.py, its weights, the plan and the report, all of them or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from demp_fx.emit.module import source
from demp_fx.errors import EmitError, UsageError
from demp_fx.report.compilation import page_of

if TYPE_CHECKING:
    from demp_fx import CompileResult

MODULE, WEIGHTS, PLAN = "module.py", "weights.safetensors", "plan.json"
REPORT, PAGE = "report.json", "report.html"
_OURS = {MODULE, WEIGHTS, PLAN, REPORT, PAGE, "__pycache__"}


def check(folder: str | Path, overwrite: bool = False) -> Path:
    """The folder's path, if `write` would not refuse it; asked before any long work."""
    target = Path(folder).absolute()
    if not target.exists() and not target.is_symlink():
        return target
    if not target.is_dir() or target.is_symlink():
        raise UsageError(f"{folder} exists and is not a folder")
    if not overwrite:
        raise UsageError(f"the folder {folder} exists: name another, or overwrite it (--overwrite)")
    others = sorted(entry.name for entry in target.iterdir() if entry.name not in _OURS)
    if others:
        raise UsageError(
            f"{folder} holds files that a compilation does not write ({', '.join(others[:5])}); "
            "it is not replaced"
        )
    return target


def write(result: CompileResult, folder: str | Path, overwrite: bool = False) -> Path:
    """Write the result as a folder, which appears whole or not at all.

    An existing folder is refused; with `overwrite` it is replaced, unless it holds other files.
    """
    target = check(folder, overwrite)
    text = source(result.module)
    weights = _weights(result.module)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise EmitError(f"cannot write {folder}: {error}") from error
    try:
        (draft / MODULE).write_text(text, encoding="utf-8")
        save_file(weights, draft / WEIGHTS)
        result.plan.save(draft / PLAN)
        result.report.save(draft / REPORT)
        (draft / PAGE).write_text(page_of(result.report), encoding="utf-8")
        _open_up(draft)
        _swap(draft, target)
    except (OSError, SafetensorError) as error:
        raise EmitError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict as safetensors can hold it: tied tensors are written out once per name."""
    weights = {}
    for key, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise EmitError(f"'{key}' of the state_dict is not a tensor")
        weights[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return weights


def _open_up(draft: Path) -> None:
    """Give the temporary folder, private until now, the rights that a new one would have."""
    umask = os.umask(0)
    os.umask(umask)
    draft.chmod(0o777 & ~umask)


def _swap(draft: Path, target: Path) -> None:
    """Put `draft` in the place of `target`; what was there goes only once that has worked."""
    if not target.exists():
        draft.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
