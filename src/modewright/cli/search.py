# SPDX-License-Identifier: Apache-2.0
"""``modewright search``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from modewright.errors import ConfigError


def _pairs(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> Any:
    """Split ``NAME=VALUE``."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name.strip() and equals and text.strip()):
            raise ConfigError(f"--{option.name} expects NAME=VALUE; received {value!r}.")
        if name.strip() in found:
            raise ConfigError(f"--{option.name}: {name.strip()!r} was given twice.")
        found[name.strip()] = text.strip()
    return found


def _values(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> Any:
    """Split ``NAME=VALUE`` and read the values as YAML."""
    import yaml

    pairs = _pairs(context, option, values)
    try:
        return {name: yaml.safe_load(text) for name, text in pairs.items()}
    except yaml.YAMLError as error:
        raise ConfigError(f"--{option.name} is not readable as YAML: {error}") from error


@click.command(name="search")
@click.argument("model")
@click.option("--mode", "-m", required=True, help="The mode that opens the search space.")
@click.option("--constraint", "-c", "constraints", multiple=True, required=True, callback=_pairs,
              metavar="NAME=VALUE",
              help="An upper bound, absolute or relative: flops=60%, params=30M, "
              "effective_bits=4.5. May be given several times.")  # fmt: skip
@click.option("--config", multiple=True, callback=_values, metavar="FIELD=VALUE",
              help="A field of the mode's config; lists as [a, b].")  # fmt: skip
@click.option("--option", "options", multiple=True, callback=_values, metavar="NAME=VALUE",
              help="An option of the mode's searcher.")  # fmt: skip
@click.option("--then", multiple=True, metavar="MODE", help="A mode to apply afterwards; several.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--checkpoint", type=click.Path(path_type=Path),
              help="A file to keep progress in; the same command goes on from it.")  # fmt: skip
@click.option("--max-trials", type=click.IntRange(min=1), help="Try no more than this.")
@click.option("--max-seconds", type=click.FloatRange(min=0), help="Begin no trial after this.")
@click.option("--calibration", default="builtin", show_default=True,
              help="Text to look at: a file, a folder, builtin, self.")  # fmt: skip
@click.option("--windows", type=click.IntRange(min=1), default=16, show_default=True,
              help="How many windows of it.")  # fmt: skip
@click.option("--length", type=click.IntRange(min=2), default=512, show_default=True,
              help="Tokens in a window.")  # fmt: skip
@click.option("--input-length", type=click.IntRange(min=1),
              help="Tokens of the input that costs are measured on; 1 for the latency of "
              "decoding. A window if left out.")  # fmt: skip
@click.option("--device", help="Where to search and measure, such as cuda; the CPU if left out.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(model: str, output: Path | None, dry_run: bool, as_json: bool, **given: Any) -> int:
    """Search what a mode opens for the best subnet of MODEL within constraints.

    MODEL is what `modewright optimize` takes, or a folder that a search wrote: that is searched
    again under other constraints, without what was scored being scored again.
    """
    from rich.console import Console

    from modewright.recipes.loader import load_recipe
    from modewright.reports.progress import ProgressDisplay
    from modewright.reports.search import search_tables
    from modewright.reports.terminal import result_table
    from modewright.run.optimize import dry_run as plan_run
    from modewright.run.optimize import optimize

    recipe = load_recipe(_recipe(given))
    with ProgressDisplay(Console(stderr=True)) as display:
        if dry_run:
            plan = plan_run(model, recipe, on_progress=display)
        else:
            try:
                more: dict[str, Any] = {"device": given["device"], "on_progress": display}
                result = optimize(model, recipe, output=output, **more)
            except KeyboardInterrupt:
                if output is not None or given["checkpoint"] is not None:
                    click.echo("\nThe same command goes on from what was finished.", err=True)
                raise
    if dry_run:
        click.echo(json.dumps(plan.to_dict(), indent=2) if as_json else str(plan))
        return 0 if plan.ok else 2
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return 0
    console = Console()
    console.print(*search_tables(result), result_table(result), sep="\n")
    written = "Nothing was written: --output names a folder to keep the model in."
    written = written if output is None else f"Written to {output}"
    console.print(written, highlight=False, soft_wrap=True)
    return 0


def _recipe(given: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe that the options stand for."""
    limits = {name: given[name] for name in ("max_trials", "max_seconds")}
    search = {
        "constraints": given["constraints"],
        "options": {**given["options"], **{k: v for k, v in limits.items() if v is not None}},
        "checkpoint": None if given["checkpoint"] is None else str(given["checkpoint"]),
        "input_length": given["input_length"],
    }
    return {
        "name": f"search of {given['mode']}",
        "steps": [
            {"mode": given["mode"], "config": given["config"], "search": search},
            *given["then"],
        ],
        "calibration": {
            "source": given["calibration"],
            "windows": given["windows"],
            "length": given["length"],
        },
    }
