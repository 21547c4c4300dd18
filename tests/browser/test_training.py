"""The page of a training run, in a real browser; takes the picture in docs/pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import DOCS, ROOT

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the example, a minute or two."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    subprocess.run(
        [sys.executable, "-m", "demp_fx.cli", "train", "examples/digits.yaml", "--out", str(out)],
        check=True, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return out


def test_it_opens_without_a_word_in_the_console_and_has_every_picture(
    browser: Any, run: Path
) -> None:
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get((run / "report.html").as_uri())
    assert browser.get_log("browser") == []
    headings = [h.text for h in browser.find_elements("css selector", "h2")]
    for heading in ("Loss and accuracy", "Channels that died, by layer", "Work and time of a step",
                    "Pressure", "Channels by layer", "Death checks", "Recipe"):  # fmt: skip
        assert heading in headings
    wide = browser.execute_script("return innerWidth")
    pictures = browser.find_elements("css selector", "svg")
    assert len(pictures) == 5
    assert all(100 < p.rect["width"] <= wide for p in pictures)
    browser.set_window_size(1200, 1500)
    browser.save_screenshot(str(DOCS / "trained.png"))
    browser.set_window_size(1440, 900)
