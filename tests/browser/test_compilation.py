"""The page that a compilation leaves, in a real browser; takes the picture in docs/pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import demp_fx
from demp_fx.emit import folder
from tests.browser.conftest import DOCS
from tests.browser.networks import NETWORKS

pytestmark = pytest.mark.browser


def test_it_opens_without_a_word_in_the_console_and_draws_every_layer(
    browser: Any, tmp_path: Path
) -> None:
    result = demp_fx.compile(NETWORKS["resnet50"].model(), torch.randn(2, 3, 64, 64))
    out = folder.write(result, tmp_path / "out")
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get((out / folder.PAGE).as_uri())
    assert browser.get_log("browser") == []
    chart = browser.find_element("css selector", 'svg[role="img"]')
    bars = chart.find_elements("css selector", "rect")
    assert len(bars) == 2 * len(result.report.widths)
    before, after = (float(bar.get_attribute("width")) for bar in bars[:2])
    first = result.report.widths[0]
    assert after / before == pytest.approx(first.out_after / first.out_before, rel=0.05)
    assert chart.rect["width"] <= browser.execute_script("return innerWidth")
    browser.save_screenshot(str(DOCS / "compiled.png"))
