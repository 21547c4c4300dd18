"""What is written for Mermaid, read by Mermaid itself."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from demp_fx.channels.groups import GroupGraph
from demp_fx.report import mermaid
from tests.report.test_formats import GRAPHS

pytestmark = pytest.mark.browser

_PARSE = """
const [text, done] = arguments;
mermaid.parse(text).then(found => done(found.diagramType), error => done(String(error)));
"""


@pytest.fixture(scope="module")
def parser(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A page with the mermaid package of npm in it."""
    if shutil.which("npm") is None:
        pytest.skip("apt-get install npm")
    folder = tmp_path_factory.mktemp("mermaid")
    done = subprocess.run(["npm", "pack", "--silent", "mermaid@11"], cwd=folder,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        pytest.skip(f"npm does not get mermaid: {done.stderr.strip()}")
    with tarfile.open(folder / done.stdout.strip()) as package:
        package.extractall(folder, filter="data")
    page = Path(folder, "page.html")
    page.write_text('<script src="package/dist/mermaid.min.js"></script>')
    browser.get(page.as_uri())
    return browser


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_it_parses(parser: Any, graph: GroupGraph) -> None:
    assert parser.execute_async_script(_PARSE, mermaid.dumps(graph)) == "flowchart-v2"


def test_it_does_not_parse_anything(parser: Any) -> None:
    assert "rror" in parser.execute_async_script(_PARSE, 'flowchart TB\n  a["unclosed]')
