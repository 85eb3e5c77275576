# SPDX-License-Identifier: Apache-2.0
"""The integer program against brute force, and the theorems that its optimum obeys."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modewright.errors import SearchError
from modewright.mixed_precision.solver import least_violation, solve, total

numbers = st.one_of(st.just(0.0), st.floats(1e-6, 1e4))


@st.composite
def problems(draw: Any, *, whole: bool = False, names: int = 2) -> Any:
    groups = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 4), min_size=groups, max_size=groups))
    value = st.integers(1, 10**6).map(float) if whole else st.floats(1e-3, 1e3)
    rows = lambda of: [draw(st.lists(of, min_size=n, max_size=n)) for n in sizes]  # noqa: E731
    scores = rows(numbers)
    costs = {f"cost{k}": rows(value) for k in range(draw(st.integers(1, names)))}
    budgets = {}
    for name, table in costs.items():
        low, high = sum(map(min, table)), sum(map(max, table))
        budgets[name] = low + draw(st.floats(0, 1)) * (high - low)
    return scores, costs, budgets


def every_choice(scores: Any) -> Any:
    return itertools.product(*(range(len(row)) for row in scores))


def brute_force(scores: Any, costs: Any, budgets: Any) -> float:
    """Return the least total score of all choices within the budgets; infinity if there is none."""
    fitting = (
        total(scores, choice)
        for choice in every_choice(scores)
        if all(total(costs[n], choice) <= budget for n, budget in budgets.items())
    )
    return min(fitting, default=math.inf)


@given(st.one_of(problems(), problems(whole=True)))
@settings(max_examples=150, deadline=None)
def test_optimum_equals_brute_force_and_holds_all_budgets(problem: Any) -> None:
    scores, costs, budgets = problem
    best = brute_force(*problem)
    if math.isinf(best):
        with pytest.raises(SearchError, match="nearest"):
            solve(*problem)
        return
    chosen = solve(*problem)

    assert all(total(costs[n], chosen) <= budget for n, budget in budgets.items())
    scale = max(max(row) for row in scores)
    assert total(scores, chosen) == pytest.approx(best, rel=1e-6, abs=1e-9 * scale)


@given(problems(names=1), st.lists(st.floats(0, 1), min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_larger_budget_never_loses_more(problem: Any, parts: list[float]) -> None:
    scores, costs, _ = problem
    (name,) = costs
    low, high = sum(map(min, costs[name])), sum(map(max, costs[name]))
    found = [
        total(scores, solve(scores, costs, {name: low + part * (high - low) + 1e-9 * low}))
        for part in sorted(parts)
    ]
    scale = max(max(row) for row in scores)
    assert all(b <= a * (1 + 1e-6) + 1e-9 * scale for a, b in itertools.pairwise(found))


def test_without_a_tight_budget_everyone_gets_what_loses_least() -> None:
    scores = [[3.0, 1.0, 2.0], [5.0, 7.0]]
    assert solve(scores, {"bits": [[1, 2, 3], [1, 2]]}, {"bits": 100}) == [1, 0]


def test_a_budget_that_is_met_exactly_is_met() -> None:
    bits = [[4.3125 * 576 * 576, 8.0 * 576 * 576]] * 200
    scores = [[1.0, 0.1]] * 200
    assert solve(scores, {"bits": bits}, {"bits": 200 * 4.3125 * 576 * 576}) == [0] * 200


def test_scores_of_very_different_sizes_are_told_apart() -> None:
    scores = [[1e6, 1e-7], [2e-7, 1e-7], [3e-7, 1e-7]]
    costs = {"bits": [[1.0, 2.0]] * 3}
    assert solve(scores, costs, {"bits": 5}) == [1, 0, 1]


def test_budgets_that_exclude_each_other_name_the_nearest_choice() -> None:
    costs = {"size": [[1.0, 9.0]] * 2, "time": [[9.0, 1.0]] * 2}
    with pytest.raises(SearchError, match=r"size <= 2, time <= 2 at once.*nearest"):
        solve([[1.0, 1.0]] * 2, costs, {"size": 2, "time": 2})


@given(problems())
@settings(max_examples=40, deadline=None)
def test_nearest_choice_exceeds_the_budgets_as_little_as_any(problem: Any) -> None:
    scores, costs, budgets = problem
    halves = {name: budget / 2 for name, budget in budgets.items()}

    def excess(choice: Any) -> float:
        return sum(max(total(costs[n], choice) / b - 1, 0) for n, b in halves.items())

    least = min(map(excess, every_choice(scores)))
    assert excess(least_violation(costs, halves)) == pytest.approx(least, rel=1e-5, abs=1e-5)
