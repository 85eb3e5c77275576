# SPDX-License-Identifier: Apache-2.0
"""``modewright verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(name="verify")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def command(path: Path, as_json: bool) -> int:
    """Check every byte of the checkpoint at PATH against the digests it carries."""
    from modewright.api import verify
    from modewright.reports.units import size

    found = verify(path)
    if as_json:
        data = {"path": str(found.path), "modes": list(found.modes)}
        click.echo(json.dumps({**data, "tensors": found.tensors, "bytes": found.bytes}, indent=2))
    else:
        modes = ", ".join(found.modes) or "none"
        click.echo(
            f"{found.path} is intact: {found.tensors} tensors, {size(found.bytes)}. Modes: {modes}."
        )
    return 0
