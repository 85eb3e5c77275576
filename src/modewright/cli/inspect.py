# SPDX-License-Identifier: Apache-2.0
"""``modewright inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command(name="inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def command(path: Path, as_json: bool) -> int:
    """Say what the checkpoint at PATH (a .safetensors file or a folder) holds."""
    from rich.console import Console

    from modewright.modes.checkpoint import inspect
    from modewright.reports.terminal import inspection_table

    found = inspect(path)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        Console().print(inspection_table(found))
    return 0
