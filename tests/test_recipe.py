"""Recipes: defaults of the paper, YAML in and out, errors that name the field."""

from __future__ import annotations

from pathlib import Path

import pytest

import demp_fx
from demp_fx.errors import UsageError
from demp_fx.recipe import Recipe


def test_defaults_are_the_papers_for_resnet18() -> None:
    recipe = Recipe()
    assert (recipe.span, recipe.prune_every, recipe.noise_std) == (85_000, 5_000, 5e-5)
    assert (recipe.death_threshold, recipe.min_width, recipe.target) == (0.0, 1, None)


def test_yaml_in_and_out(tmp_path: Path) -> None:
    recipe = demp_fx.Recipe(penalty=1e-2, span="60%", target={"macs": 0.35}, exempt=["head.*"])
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert demp_fx.Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert demp_fx.Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("penalty: -1", "penalty"),
        ("noise: 1", "noise"),
        ("span: 120%", "span"),
        ("death_test: three-sided", "death_test"),
        ("target: {macs: 0.3, params: 0.2}", "name one of macs, params, channels"),
        ("target: {macs: 1.3}", "lies between 0 and 1"),
        ("target: {flops: 0.3}", "target.flops"),
        ("- 1", "recipe.yaml"),
        ("seed: 18446744073709551616", "seed"),
        ("noise_std: .inf", "noise_std"),
        ("a: [", "cannot be read"),
    ],
)
def test_errors_name_the_field(text: str, field: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=field):
        Recipe.from_yaml(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "none.yaml")


def test_a_span_in_percent_needs_the_length_of_the_run() -> None:
    assert Recipe(span="25%").steps(1000) == 250
    assert Recipe(span=300).steps(None) == 300
    with pytest.raises(UsageError, match="total_steps"):
        Recipe(span="25%").steps(None)


@pytest.mark.parametrize(
    ("layer", "taken"), [("layer1.0.conv1", True), ("layer2.0.conv1", False), ("fc", False)]
)
def test_layers_take_part_by_pattern(layer: str, taken: bool) -> None:
    assert Recipe(only=["layer*"], exempt=["layer2.*"]).takes(layer) is taken
