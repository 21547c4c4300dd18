"""The README's Python example runs as it is written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    exec(compile(example, str(README), "exec"), {"__name__": "readme"})
    layer, params = capsys.readouterr().out.splitlines()
    assert layer.startswith("Conv2d(3, 4,")
    assert params == "1914 -> 486 parameters"
