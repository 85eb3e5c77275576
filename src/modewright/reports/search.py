# SPDX-License-Identifier: Apache-2.0
"""The table of a search: the points visited that no other one beats, and the one that was taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from modewright.reports.units import number, seconds, size

if TYPE_CHECKING:
    from modewright.modes.search import SearchPoint, SearchResult
    from modewright.run.result import Result

_NAMES = {
    "params": "parameters",
    "active_params": "active parameters",
    "size_bytes": "size",
    "flops": "FLOPs",
    "latency": "latency",
    "effective_bits": "effective bits",
}


def search_tables(result: Result) -> list[Table]:
    """Return the tables of all searches of a run."""
    return [search_table(found) for found in result.searches]


def search_table(found: SearchResult) -> Table:
    """Return the Pareto points of a search, the cheapest first; the bounds are in the first row."""
    points = found.pareto()
    names = list(dict.fromkeys([*found.constraints, *found.costs]))
    table = Table(title=f"search of {escape(found.mode)}: {len(found.points)} points visited")
    table.add_column("")
    for name in names:
        table.add_column(_NAMES.get(name, escape(name)), justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("chosen")
    bounds = [_bound(found, name) for name in names]
    table.add_row("at most", *bounds, "", "", end_section=True)
    for point in points:
        taken = _is_best(point, found)
        table.add_row(
            "taken" if taken else "",
            *(_cost(name, point.costs.get(name)) for name in names),
            number(point.score),
            escape(_subnet(point.subnet)),
            style="bold" if taken else None,
        )
    if not any(_is_best(point, found) for point in points):
        costs = [_cost(name, found.costs.get(name)) for name in names]
        score = found.best.get("score")
        score = number(score) if isinstance(score, float) else ""
        table.add_row("taken", *costs, score, "", style="bold")
    return table


def _bound(found: SearchResult, name: str) -> str:
    if name not in found.constraints:
        return ""
    given = found.constraints[name]
    absolute = found.bounds.get(name)
    shown = str(given) if absolute is None else _cost(name, absolute)
    return f"{shown} ({given})" if isinstance(given, str) and given.endswith("%") else shown


def _is_best(point: SearchPoint, found: SearchResult) -> bool:
    return point.costs == found.costs and point.score == found.best.get("score")


def _cost(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "size_bytes":
        return size(round(value))
    if name == "latency":
        return f"{1e3 * value:.3g} ms" if value < 1 else seconds(value)
    for divisor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= divisor:
            return f"{value / divisor:.4g}{unit}"
    return number(value)


def _subnet(subnet: Any) -> str:
    """Return what was chosen in short."""
    if isinstance(subnet, dict):
        shown = {k: v for k, v in subnet.items() if v}
        parts = [f"{key}: {value}" for key, value in list(shown.items())[:8]]
        return ", ".join(parts) + (" ..." if len(shown) > 8 else "")
    text = "" if subnet is None else str(subnet)
    return text if len(text) <= 80 else f"{text[:77]}..."
