# SPDX-License-Identifier: Apache-2.0
"""``modewright bench``."""

from __future__ import annotations

import json

import click


@click.command(name="bench")
@click.argument("model")
@click.option("--recipe", "-r", help="Optimize MODEL by it first, and compare with MODEL.")
@click.option("--against", help="The model to compare with; a written folder knows its original.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads for torch.")
@click.option("--prompt", type=click.IntRange(min=1), default=64, show_default=True,
              help="Tokens before decoding begins.")  # fmt: skip
@click.option("--length", type=click.IntRange(min=1), default=512, show_default=True,
              help="Tokens of the prefill.")  # fmt: skip
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True,
              help="How often everything is measured.")  # fmt: skip
@click.option("--device", help="Where it is measured, such as cuda; the CPU if left out.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def command(
    model: str,
    recipe: str | None,
    against: str | None,
    threads: int | None,
    prompt: int,
    length: int,
    repeats: int,
    device: str | None,
    as_json: bool,
) -> int:
    """Measure how fast and how large MODEL is, beside the model that it was made from.

    MODEL is a folder that `modewright optimize` wrote, or any model that it takes.
    """
    from rich.console import Console

    from modewright.reports.bench import bench_table
    from modewright.reports.progress import ProgressDisplay
    from modewright.run.bench import bench

    with ProgressDisplay(Console(stderr=True)) as display:
        result = bench(
            model,
            recipe=recipe,
            against=against,
            threads=threads,
            prompt=prompt,
            length=length,
            repeats=repeats,
            device=device,
            on_progress=display,
        )
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
    else:
        Console().print(bench_table(result))
    return 0
