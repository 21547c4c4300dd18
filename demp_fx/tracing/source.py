"""Where in the user's files something happened, as "file:line"."""

from __future__ import annotations

import linecache
import re
import traceback
import types
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent) + "/"
_HERE = str(Path(__file__).parents[1]) + "/"
_FACE = _HERE + "trace.py"
_FRAME = re.compile(r'File "(.+?)", line (\d+)')


def user_line(frame: types.FrameType | None) -> str:
    """The innermost line outside torch and this package, or else outside torch.fx, in `trace`."""
    inner = "torch:0"
    while frame is not None and frame.f_code.co_filename != _FACE:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE)):
            return f"{file}:{frame.f_lineno}"
        if inner == "torch:0" and not file.startswith((_TORCH + "fx/", _HERE)):
            inner = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return inner


def users_frame(frame: types.FrameType | None) -> types.FrameType | None:
    """The innermost frame outside torch.fx and this package; None if it is torch's."""
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH + "fx/", _HERE)):
        frame = frame.f_back
    torchs = frame is None or frame.f_code.co_filename.startswith(_TORCH)
    return None if torchs else frame


def failed_at(error: BaseException) -> str:
    """The innermost line outside torch and this package, or else of all, on `error`'s way."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith((_TORCH, _HERE))]
    frame = (users or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def quoted(line: str) -> str:
    """A "file:line" followed by the text of that line."""
    file, _, number = line.rpartition(":")
    return f"{line}: `{linecache.getline(file, int(number)).strip()}`"


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def traced_line(stack: str) -> str | None:
    """The innermost line outside torch and this package in a stack trace as torch.export keeps it;
    None where there is none."""
    lines = [
        f"{file}:{number}"
        for file, number in _FRAME.findall(stack)
        if not file.startswith((_TORCH, _HERE, "torch/"))
    ]
    return lines[-1] if lines else None
