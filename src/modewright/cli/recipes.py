# SPDX-License-Identifier: Apache-2.0
"""``modewright recipes``."""

from __future__ import annotations

import json

import click


@click.command(name="recipes")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(name: str | None, as_json: bool) -> int:
    """List the recipes; with NAME (or a YAML file), show it with all defaults filled in."""
    import yaml
    from rich.console import Console

    from modewright.builtin_modes import default_registry
    from modewright.recipes.checking import check_steps
    from modewright.recipes.loader import load_recipe, recipe_names
    from modewright.reports.modes import recipes_table

    if name is None:
        recipes = [load_recipe(known) for known in recipe_names()]
        if as_json:
            click.echo(json.dumps([r.model_dump(mode="json") for r in recipes], indent=2))
        else:
            Console().print(recipes_table(recipes))
        return 0
    recipe = load_recipe(name)
    check_steps(recipe, default_registry)
    data = recipe.model_dump(mode="json")
    click.echo(json.dumps(data, indent=2) if as_json else yaml.safe_dump(data, sort_keys=False))
    return 0
