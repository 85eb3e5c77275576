# SPDX-License-Identifier: Apache-2.0
"""The table of a search."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console
from torch import nn

from modewright.modes.search import SearchPoint, SearchResult
from modewright.reports.search import search_table


def shown(points: list[SearchPoint], best: dict[str, Any], constraints: dict[str, Any]) -> str:
    found = SearchResult(
        model=nn.Identity(),
        mode="fast[1]",
        best=best,
        costs=best["costs"],
        constraints=constraints,
        bounds={"size_bytes": 3 * 2**20, "latency": 0.004},
        points=tuple(points),
    )
    console = Console(width=160, record=True, file=StringIO())
    console.print(search_table(found))
    return console.export_text()


def point(score: float, size: float, **more: Any) -> SearchPoint:
    return SearchPoint(costs={"size_bytes": size, "latency": 0.0025, "params": 2.5e6}, score=score,
                       **more)  # fmt: skip


CONSTRAINTS = {"size_bytes": "60%", "latency": "4ms"}


def test_pareto_points_are_shown_cheapest_first_with_the_one_taken() -> None:
    small, large = point(-2.0, 2**20, subnet={"a": 3, "b": 0}), point(-1.0, 2 * 2**20)
    beaten = point(-3.0, 3 * 2**20)
    text = shown([large, beaten, small], {"costs": large.costs, "score": -1.0}, CONSTRAINTS)
    rows = [line for line in text.splitlines() if "MiB" in line]

    assert "fast[1]: 3 points visited" in text
    assert "3.0 MiB (60%)" in rows[0]
    assert "4 ms" in rows[0]
    assert "1.0 MiB" in rows[1]
    assert "a: 3" in rows[1]
    assert "b: 0" not in rows[1]
    assert "taken" in rows[2]
    assert "2.5 ms" in rows[2]
    assert "2.5 M" in rows[2]
    assert len(rows) == 3


def test_what_was_taken_is_shown_also_if_no_point_was_recorded_for_it() -> None:
    best = {"costs": {"size_bytes": 2**20, "latency": 0.5}, "score": 4.0}
    rows = [r for r in shown([], best, CONSTRAINTS).splitlines() if "taken" in r]

    assert len(rows) == 1
    assert "500 ms" in rows[0]
