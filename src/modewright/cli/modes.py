# SPDX-License-Identifier: Apache-2.0
"""``modewright modes``."""

from __future__ import annotations

import json

import click


@click.command(name="modes")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(name: str | None, as_json: bool) -> int:
    """List the modes; with NAME, show its config fields, their defaults, and its rules."""
    from rich.console import Console

    from modewright.builtin_modes import default_registry
    from modewright.reports import modes as report

    if name is None:
        if as_json:
            rows = {n: default_registry.listed_summary(n) for n in default_registry}
            click.echo(json.dumps(rows, indent=2))
        else:
            Console().print(report.modes_table(default_registry))
        return 0
    mode = default_registry[name]
    if as_json:
        click.echo(json.dumps(report.mode_data(mode), indent=2))
    else:
        Console().print(*report.mode_tables(mode), sep="\n")
    return 0
