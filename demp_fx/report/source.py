"""Lines of the user's files, as reports show them."""

from __future__ import annotations

import linecache
from pathlib import Path


def short(source: str | None) -> str:
    """A "file:line" without the folder that it is in: of installed packages, or that of work."""
    if source is None:
        return ""
    file, _, number = source.rpartition(":")
    _, installed, rest = file.rpartition("/site-packages/")
    if installed:
        return f"{rest}:{number}"
    here = Path.cwd()
    path = Path(file)
    return f"{path.relative_to(here)}:{number}" if path.is_relative_to(here) else source


def place(source: str | None) -> str:
    """The words "at file:line" with a space in front, or nothing."""
    return f" at {short(source)}" if source else ""


def code_at(source: str | None) -> str:
    """The text of a line, or nothing where the file is not there."""
    file, _, number = (source or "").rpartition(":")
    return linecache.getline(file, int(number)).strip() if file and number.isdigit() else ""
