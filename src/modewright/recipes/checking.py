# SPDX-License-Identifier: Apache-2.0
"""Checking what a recipe says of modes, before anything is loaded: names and configs."""

from __future__ import annotations

from collections.abc import Sequence

from modewright.errors import ConfigError, ModewrightError
from modewright.modes.config import build_config
from modewright.modes.registry import ModeRegistry
from modewright.recipes.schema import Recipe, RecipeStep


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
        except ModewrightError as error:
            raise ConfigError(f"{recipe.place(*here, member)}: {error}") from error
        _check(recipe, step.fallback, (*here, "fallback"), registry)
