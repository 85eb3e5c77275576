# SPDX-License-Identifier: Apache-2.0
"""Tables of what multiplies packed weights on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from modewright.runtime.backends.survey import Row, Survey


def backend_tables(survey: Survey) -> list[Table]:
    """Return what this machine is, the backends, and what serves which weights."""
    machine = Table(show_header=False, title="this machine")
    for name, value in survey.machine.items():
        machine.add_row(name, escape(value))
    known = Table("backend", "how", "needs", "error", "copy", title="backends, best first")
    for backend in survey.backends:
        known.add_row(
            escape(backend["name"]),
            escape(backend["summary"]),
            escape(backend["needs"]),
            f"{backend['accuracy']:.0e}",
            "yes" if backend["copies"] else "no",
        )
    return [machine, known, _served(survey.rows)]


def _served(rows: tuple[Row, ...]) -> Table:
    """Return one line for each weight; rows that have the same answer share it."""
    table = Table(
        "weights", "activations", "rows", "served by", "because", title="what serves what"
    )
    merged: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        why = "\n".join(f"{name}: {reason}" for name, reason in row.refusals.items())
        key = (row.weight, row.activations, row.backend, why)
        merged.setdefault(key, []).append(str(row.rows))
    for (weight, activations, backend, why), counts in merged.items():
        table.add_row(
            escape(weight),
            escape(activations),
            ", ".join(counts),
            escape(backend),
            escape(why or "it is the first choice"),
        )
    return table
