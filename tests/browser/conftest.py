"""Pages of the networks, made by the command line, and a browser to open them in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import chromium
from tests.browser.networks import NETWORKS, Shown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "pictures"


@dataclass(frozen=True)
class Page:
    """A page that was made, and how long that took the whole process: in all, and of processors."""

    network: Shown
    path: Path
    seconds: float
    processor: float


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium without a network."""
    pytest.importorskip("selenium", reason="pip install '.[browser]'")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("apt-get install chromium chromium-driver")
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="session", params=NETWORKS)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """`demp-fx inspect` of a network, as a process of its own."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    (folder / "model.py").write_text(
        f"from tests.browser.networks import NETWORKS\n_it = NETWORKS[{name!r}]\n"
        "model, example_inputs = _it.model(), _it.example()\n"
    )
    start, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-m", "demp_fx.cli", "inspect", str(folder / "model.py"),
         "--format", "html", "--out", str(folder / f"{name}.html")],
        check=True, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    after = os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    return Page(NETWORKS[name], folder / f"{name}.html", time.perf_counter() - start, used)
