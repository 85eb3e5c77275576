# SPDX-License-Identifier: Apache-2.0
"""Reading recipes: by name from the library, or from a YAML file; errors name file and line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from modewright.errors import ConfigError, did_you_mean
from modewright.recipes.schema import Checks, Recipe, RecipeStep, TextData

LIBRARY = Path(__file__).parent / "library"
MAX_PLACES = 10_000
MAX_DEPTH = 32

_Place = tuple["str | int", ...]
# What pydantic says of Python's types, said of YAML's.
_WORDS = {
    "tuple_type": "a list was expected",
    "dict_type": "a mapping was expected",
    "model_type": "a mapping was expected, such as `mode: NAME`, or a name alone",
}


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with modewright."""
    return sorted(path.stem for path in LIBRARY.glob("*.yaml"))


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """Return a recipe.

    Args:
        recipe: The name of one in the library, the path of a YAML file, its content as a mapping,
            or a recipe.

    Raises:
        ConfigError: There is no such recipe, or it is not valid; the message gives file and line.

    Example:
        >>> import modewright
        >>> [step.mode for step in modewright.load_recipe("w8a8").steps]
        ['quantize', 'max_calibrate']
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _validated(dict(recipe), {}, "the recipe")
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"The recipe file {path} does not exist.")
    else:
        path = LIBRARY / f"{recipe}.yaml"
        if str(recipe) not in recipe_names():
            raise ConfigError(
                f"There is no recipe {str(recipe)!r}.{did_you_mean(str(recipe), recipe_names())} "
                f"Known: {', '.join(recipe_names())}. A file must end in .yaml."
            )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error}") from error
    data, lines = _parse(text, str(path))
    return _validated({"name": path.stem, **data}, lines, str(path))


def _validated(data: dict[str, Any], lines: dict[_Place, int], where: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems = []
        found = error.errors(include_url=False)
        places = [tuple(problem["loc"]) for problem in found]
        for problem, place in zip(found, places, strict=True):
            inner = any(p[: len(place)] == place and len(p) > len(place) for p in places)
            if problem["type"] == "too_short" and inner:
                continue  # pydantic counts only the items that are valid
            line = _line(lines, place)
            path = ".".join(str(part) for part in place) or "the whole recipe"
            said = _WORDS.get(problem["type"], problem["msg"])
            if problem["type"] == "extra_forbidden":
                said = f"there is no such field.{did_you_mean(str(place[-1]), _fields(place))}"
            at = f"{where}:{line}" if line else where
            problems.append(f"  {at}: {path}: {said}")
        raise ConfigError("The recipe is not valid:\n" + "\n".join(problems)) from error
    recipe._origin, recipe._lines = where if lines else "", lines
    return recipe


def _fields(place: _Place) -> list[str]:
    """Return the names of the fields that exist where an unknown one was found."""
    owners: dict[str, type[BaseModel]] = {
        "steps": RecipeStep,
        "fallback": RecipeStep,
        "checks": Checks,
    }
    owners |= {"calibration": TextData, "evaluation": TextData}
    parents = [part for part in place[:-1] if isinstance(part, str)]
    owner = owners.get(parents[-1], Recipe) if parents else Recipe
    return list(owner.model_fields)


def _line(lines: dict[_Place, int], place: _Place) -> int | None:
    """Return the line of a place, or of the nearest thing around it."""
    for end in range(len(place), -1, -1):
        if place[:end] in lines:
            return lines[place[:end]]
    return None


def _parse(text: str, where: str) -> tuple[dict[str, Any], dict[_Place, int]]:
    """Return the content of a YAML mapping and the line of everything in it."""
    lines: dict[_Place, int] = {}
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _note_lines(node, (), lines, where)
        data = loader.construct_document(node) if node is not None else None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = str(error).replace('"<unicode string>"', where)
        raise ConfigError(f"The recipe {where} is not valid YAML: {said}") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(
            f"The recipe {where} must be a mapping with the keys {', '.join(Recipe.model_fields)}."
        )
    return data, lines


def _note_lines(node: yaml.Node, place: _Place, lines: dict[_Place, int], where: str) -> None:
    """Note the line of every place, and refuse what aliases blow up or turn into a circle."""
    line = node.start_mark.line + 1
    if len(lines) >= MAX_PLACES or len(place) >= MAX_DEPTH:
        raise ConfigError(
            f"{where}:{line}: the recipe has more than {MAX_PLACES} entries or is nested more "
            f"than {MAX_DEPTH} deep, aliases counted as what they stand for."
        )
    lines[place] = line
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            if inner in lines:
                raise ConfigError(f"{where}:{key.start_mark.line + 1}: {key.value!r} occurs twice.")
            _note_lines(value, inner, lines, where)
            lines[inner] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*place, index), lines, where)
