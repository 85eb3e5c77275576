# SPDX-License-Identifier: Apache-2.0
"""Reading recipes, and saying what is wrong with them and where."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modewright.builtin_modes import default_registry
from modewright.errors import ConfigError
from modewright.modes.planning import plan
from modewright.recipes.loader import load_recipe, recipe_names
from modewright.recipes.schema import Recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_library_is_valid_and_its_modes_may_follow_one_another(
    name: str,
) -> None:
    recipe = load_recipe(name)

    assert recipe.name == name
    assert recipe.summary
    assert plan(None, recipe.modes(), registry=default_registry).ok


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'w8a8'"):
        load_recipe("w8a")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml does not exist"):
        load_recipe(tmp_path / "missing.yaml")


def test_a_recipe_passes_through() -> None:
    recipe = load_recipe("w8a8")

    assert load_recipe(recipe) is recipe
    assert load_recipe(recipe.model_dump()).model_dump() == recipe.model_dump()


GOOD = """\
steps:
  - mode: quantize
    config: {scheme: w8a8}
  - mode: max_calibrate
calibration:
  windows: 4
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read_and_named_after_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))

    assert recipe.name == "mine"
    assert recipe.modes() == [("quantize", {"scheme": "w8a8"}), ("max_calibrate", {})]
    assert recipe.calibration.windows == 4


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("windows: 4", "windwos: 4"), 6, "there is no such field. Did you mean 'windows'"),
        (("windows: 4", "windows: 0"), 6, "greater than or equal to 1"),
        (("windows: 4", "windows: many"), 6, "valid integer"),
        (("mode: max_calibrate", "mod: max_calibrate"), 4, "there is no such field"),
        (("calibration:", "calibratoin:"), 5, "Did you mean 'calibration'"),
        (("steps:", "summary: x\nsteps: []\nold:"), 2, "at least 1 item"),
        (("    config: {scheme: w8a8}\n", "    config: 3\n"), 3, "a mapping was expected"),
    ],
    ids=["typo", "range", "type", "step key", "top-level typo", "no steps", "config"],
)
def test_an_error_names_file_and_line(
    tmp_path: Path, change: tuple[str, str], line: int, words: str
) -> None:
    path = write(tmp_path, GOOD.replace(*change))

    with pytest.raises(ConfigError) as caught:
        load_recipe(path)

    assert f"{path}:{line}: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: &x [*x]\n", "nested more than"),
        (
            "a: &a [1,2,3,4,5,6,7,8,9]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
            "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
            "e: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n",
            "more than 10000 entries",
        ),
        ("steps: []\nsteps: []\n", "'steps' occurs twice"),
        ("steps: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("? [a]\n: b\n", "mapping"),
    ],
    ids=["syntax", "list", "empty", "circle", "bomb", "twice", "code", "odd key"],
)
def test_what_is_not_a_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe(write(tmp_path, text))


def test_aliases_stand_for_what_they_repeat(tmp_path: Path) -> None:
    text = "calibration: &data {windows: 3}\nevaluation: *data\nsteps: [{mode: quantize}]\n"

    recipe = load_recipe(write(tmp_path, text))

    assert recipe.calibration == recipe.evaluation


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(path)


@given(st.text(max_size=60))
def test_no_text_does_anything_but_load_or_raise_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(text, encoding="utf-8", errors="ignore")

    try:
        outcome: object = load_recipe(path)
    except ConfigError as error:
        outcome = error

    assert isinstance(outcome, (Recipe, ConfigError))


def test_a_step_may_be_a_name_alone(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "steps: [quantize, max_calibrate]\n"))

    assert recipe.modes() == [("quantize", {}), ("max_calibrate", {})]


def test_a_place_is_a_file_and_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path)

    assert recipe.place("steps", 0, "config") == f"{path}:3"
    assert recipe.place("steps", 1, "config") == f"{path}:4"
    assert load_recipe({"name": "x", "steps": ["quantize"]}).place("steps", 0) == "recipe 'x'"
