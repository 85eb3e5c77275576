# SPDX-License-Identifier: Apache-2.0
"""Checking what a recipe says of modes, before anything is loaded: names, configs, searches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modewright.errors import ConfigError, ModewrightError
from modewright.modes.config import build_config
from modewright.modes.constraints import Constraints
from modewright.modes.registry import ModeRegistry
from modewright.recipes.schema import Recipe, RecipeStep, SearchPart

if TYPE_CHECKING:
    from modewright.modes.searcher import BaseSearcher


def check_steps(recipe: Recipe, registry: ModeRegistry) -> None:
    """Check that every mode of a recipe, fallbacks too, exists and that its config validates.

    Raises:
        ConfigError: One does not; the message gives file and line.
    """
    _check(recipe, recipe.steps, ("steps",), registry)


def _check(
    recipe: Recipe,
    steps: Sequence[RecipeStep],
    path: tuple[str | int, ...],
    registry: ModeRegistry,
) -> None:
    for index, step in enumerate(steps):
        here = (*path, index)
        where = f"mode {step.mode!r}"
        member = "mode"
        try:
            config_class = registry[step.mode].config_class
            member = "config"
            build_config(config_class, step.config, where=where)
            if step.search is not None:
                member = "search"
                _check_search(registry[step.mode].search_algorithm(), step.search)
        except ModewrightError as error:
            raise ConfigError(f"{recipe.place(*here, member)}: {error}") from error
        _check(recipe, step.fallback, (*here, "fallback"), registry)


def _check_search(searcher: BaseSearcher, search: SearchPart) -> None:
    from modewright.modes.searcher import CALLER_OPTIONS  # it needs torch

    Constraints.parse(search.constraints, search.constraints)  # which ones exist it says later
    brought = [name for name in CALLER_OPTIONS if name in search.options]
    if brought:
        raise ConfigError(
            f"options of a search cannot hold {', '.join(brought)}: a run brings its own. A path "
            "to keep progress in is `checkpoint` beside `options`."
        )
    searcher.sanitize_search_config(search.options)
