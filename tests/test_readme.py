"""The Python examples of the documentation run as they are written."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from demp_fx.training.config import RunConfig

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    exec(compile(example, str(README), "exec"), {"__name__": "readme"})
    layer, params = capsys.readouterr().out.splitlines()
    assert layer.startswith("Conv2d(3, 4,")
    assert params == "1914 -> 486 parameters"


def test_the_example_of_training_runs() -> None:
    page = README.parent / "docs" / "training.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    space: dict[str, Any] = {"__name__": "training"}
    exec(compile(example, str(page), "exec"), space)
    assert [event.step for event in space["demon"].events] == [0, 20, 40, 60, 80, 100]
    assert space["result"].module(space["images"]).shape == (256, 10)


def test_the_recipe_of_training_is_valid() -> None:
    page = README.parent / "docs" / "training.md"
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL)
    config = RunConfig.from_dict(yaml.safe_load(recipe))
    assert config.demon is not None
    assert config.demon.steps(1000) == 870
