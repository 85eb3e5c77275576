# SPDX-License-Identifier: Apache-2.0
"""``modewright backends``."""

from __future__ import annotations

import json

import click


@click.command(name="backends")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Where the model would run.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
              show_default=True, help="The dtype of activations.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Threads for torch.")
@click.option("--measure", is_flag=True, help="Choose by timing instead of by rules.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(device: str, dtype: str, threads: int | None, measure: bool, as_json: bool) -> int:
    """Show what multiplies packed weights on this machine, and why not the others."""
    import torch
    from rich.console import Console

    from modewright.errors import ConfigError
    from modewright.reports.backends import backend_tables
    from modewright.runtime.backends.survey import survey

    if measure and device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--measure --device cuda needs a GPU; torch finds none here.")
    if threads is not None:
        torch.set_num_threads(threads)
    found = survey(device, getattr(torch, dtype), measure=measure)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        Console().print(*backend_tables(found), sep="\n")
    return 0
