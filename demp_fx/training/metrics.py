"""Metrics of a run: lines of JSON, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
Record = dict[str, Any]


class Metrics:
    """Appends records to a file; each is a line, with its `kind` and `step`.

    `offset`: how much of the file belongs to the run so far; what a killed process wrote beyond is
    dropped. Where the disk is full, `say` is told once, and the run goes on without.
    """

    def __init__(
        self, folder: Path, offset: int, say: Callable[[str], None], board: bool = True
    ) -> None:
        self.path, self.say, self.failed = folder / METRICS, say, False
        self.file = self.path.open("a+b")
        self.file.truncate(offset)
        self.writer = _board(folder / "tensorboard") if board else None

    @property
    def offset(self) -> int:
        """How long the file is."""
        with contextlib.suppress(OSError):
            self.file.flush()
        return self.path.stat().st_size

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record."""
        record: Record = {"kind": kind, "step": step, **values}
        try:
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
            if self.writer is not None:
                for key, value in values.items():
                    if isinstance(value, (int, float)):
                        self.writer.add_scalar(f"{kind}/{key}", value, step)
        except OSError as error:
            if not self.failed:
                self.say(f"warning: metrics cannot be written ({error}); the run goes on")
            self.failed = True

    def close(self) -> None:
        """Write what is left."""
        with contextlib.suppress(OSError):
            self.file.close()
        if self.writer is not None:
            self.writer.close()


def _board(folder: Path) -> Any:
    """A writer for TensorBoard; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def read(folder: Path) -> list[Record]:
    """All whole records of a run, in order."""
    records = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed process
            records.append(json.loads(line))
    return records
