# SPDX-License-Identifier: Apache-2.0
"""``modewright optimize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command(name="optimize")
@click.argument("model", required=False)
@click.option(
    "--recipe", "-r", default="w8a8", show_default=True, help="Name of a recipe, or a YAML file."
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Go block by block from the model's files to the output, for a model larger than memory.",
)
@click.option("--device", help="Where to optimize and measure, such as cuda; the CPU if left out.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str | None,
    recipe: str,
    output: Path | None,
    stream: bool | None,
    device: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Optimize MODEL by a recipe; prove and measure what comes out.

    MODEL is a local Hugging Face folder, a GGUF file, or demo:smollm2; it may be left out if the
    recipe names one.
    """
    from modewright.recipes.loader import load_recipe

    loaded = load_recipe(recipe)
    model = model or loaded.model
    if model is None:
        raise click.UsageError("MODEL is missing, and the recipe does not name one.")

    from rich.console import Console

    from modewright.reports.progress import ProgressDisplay
    from modewright.reports.search import search_tables
    from modewright.reports.terminal import result_table
    from modewright.run.optimize import dry_run as plan_run
    from modewright.run.optimize import optimize

    with ProgressDisplay(Console(stderr=True)) as display:
        if dry_run:
            plan = plan_run(model, loaded, stream=stream, on_progress=display)
        else:
            try:
                more: dict[str, Any] = {"stream": stream, "device": device, "on_progress": display}
                result = optimize(model, loaded, output=output, **more)
            except KeyboardInterrupt:
                if output is not None:
                    click.echo("\nThe same command goes on from what was finished.", err=True)
                raise
    if dry_run:
        click.echo(json.dumps(plan.to_dict(), indent=2) if as_json else str(plan))
        return 0 if plan.ok else 2
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return 0 if result.ok else 1
    console = Console()
    console.print(*search_tables(result), result_table(result), sep="\n")
    written = "Nothing was written: --output names a folder to keep the model in."
    written = written if output is None else f"Written to {output}"
    console.print(written, highlight=False, soft_wrap=True)
    return 0 if result.ok else 1
