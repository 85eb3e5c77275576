# SPDX-License-Identifier: Apache-2.0
"""The integer program: one candidate for each group, the least total score, within all budgets.

With ``x[g, c]`` in {0, 1}: minimize ``sum score[g, c] x[g, c]`` subject to ``sum_c x[g, c] = 1``
for every group and ``sum cost[k][g, c] x[g, c] <= budget[k]`` for every cost ``k`` (a knapsack
problem with multiple choice and several dimensions). It is solved to optimality by HiGHS (Huangfu
and Hall 2018) through SciPy.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, vstack

from modewright.errors import SearchError

Table = Sequence[Sequence[float]]
_TIGHTER = 1e-7  # by which part a budget is lowered if rounding in the solver went over it
_ATTEMPTS = 20


def solve(scores: Table, costs: Mapping[str, Table], budgets: Mapping[str, float]) -> list[int]:
    """Return for every group the index of its candidate.

    Args:
        scores: What each candidate of each group loses, ``[groups][candidates]``, 0 or more. Groups
            may have different numbers of candidates.
        costs: By name what each of them costs, of the same form.
        budgets: By name the largest sum of costs; every one of them has costs.

    Raises:
        SearchError: No choice is within all budgets; the message says the nearest one.
    """
    allowed = dict(budgets)
    for _ in range(_ATTEMPTS):
        chosen = _solve(scores, costs, allowed)
        if chosen is None:
            break
        over = [n for n, budget in budgets.items() if total(costs[n], chosen) > budget]
        if not over:
            return chosen
        for name in over:
            allowed[name] *= 1 - _TIGHTER
    nearest = least_violation(costs, budgets)
    asked = ", ".join(f"{name} <= {budget:g}" for name, budget in budgets.items())
    found = ", ".join(f"{name} = {total(costs[name], nearest):.6g}" for name in budgets)
    raise SearchError(
        f"No choice of candidates is within {asked} at once; the nearest one has {found}. Relax a "
        "bound, or add cheaper candidates."
    )


def total(table: Table, chosen: Sequence[int]) -> float:
    """Return the sum over the chosen candidates."""
    return math.fsum(row[index] for row, index in zip(table, chosen, strict=True))


def least_violation(costs: Mapping[str, Table], budgets: Mapping[str, float]) -> list[int]:
    """Return the choice that exceeds the budgets least, by the sum of relative excesses."""
    sizes = [len(row) for row in next(iter(costs.values()))]
    rows = [_flat(costs[name]) / budget for name, budget in budgets.items()]
    count = len(rows)
    objective = np.concatenate([np.zeros(sum(sizes)), np.ones(count)])
    picks = hstack([_one_of_each(sizes), csr_array((len(sizes), count))])
    within = hstack([csr_array(np.stack(rows)), -csr_array(np.eye(count))])
    lower = np.concatenate([np.ones(len(sizes)), np.full(count, -np.inf)])
    upper = np.ones(len(sizes) + count)
    limits = Bounds(np.zeros(len(objective)), np.append(np.ones(sum(sizes)), [np.inf] * count))
    whole = np.append(np.ones(sum(sizes)), np.zeros(count))
    matrix = csr_array(vstack([picks, within]))
    with _notes_on_stderr():
        result = milp(
            objective,
            constraints=LinearConstraint(matrix, lower, upper),
            bounds=limits,
            integrality=whole,
        )
    return _choice(result.x[: sum(sizes)], sizes)


def _solve(
    scores: Table, costs: Mapping[str, Table], budgets: Mapping[str, float]
) -> list[int] | None:
    """Return the optimum, or ``None`` if there is none."""
    kept = [_not_dominated(g, scores, [costs[n] for n in budgets]) for g in range(len(scores))]
    sizes = [len(indices) for indices in kept]
    values = _flat([[scores[g][i] for i in indices] for g, indices in enumerate(kept)])
    # Whatever a group loses at least it loses in any case; the rest is scaled to a middling size.
    starts = np.cumsum([0, *sizes[:-1]])
    values = values - np.repeat(np.minimum.reduceat(values, starts), sizes)
    positive = values[values > 0]
    values = values * (1e3 / np.median(positive) if len(positive) else 1.0)
    rows = [_one_of_each(sizes)]
    lower, upper = [np.ones(len(sizes))], [np.ones(len(sizes))]
    for name, budget in budgets.items():
        table = [[costs[name][g][i] for i in indices] for g, indices in enumerate(kept)]
        row, bound = _scaled(_flat(table), budget)
        rows.append(csr_array(row[None]))
        lower.append(np.array([-np.inf]))
        upper.append(np.array([bound]))
    within = LinearConstraint(csr_array(vstack(rows)), np.concatenate(lower), np.concatenate(upper))
    with _notes_on_stderr():
        result = milp(
            values,
            constraints=within,
            bounds=Bounds(0, 1),
            integrality=np.ones(len(values)),
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        return None
    return [kept[g][place] for g, place in enumerate(_choice(result.x, sizes))]


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Keep standard output for results: HiGHS 1.12 writes notes for its developers there."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _not_dominated(group: int, scores: Table, costs: Sequence[Table]) -> list[int]:
    """Return the candidates of a group that no other one beats in score and in all costs."""
    merits = [(s, *(t[group][i] for t in costs)) for i, s in enumerate(scores[group])]
    kept: list[int] = []
    for index in sorted(range(len(merits)), key=lambda i: (merits[i], i)):
        own = merits[index]
        if not any(all(a <= b for a, b in zip(merits[k], own, strict=True)) for k in kept):
            kept.append(index)
    return sorted(kept)


def _scaled(row: np.ndarray, budget: float) -> tuple[np.ndarray, float]:
    """Return a constraint in units in which the solver's tolerances mean nothing.

    Whole numbers (bits) are divided by what they all have in common, and the bound lies half way to
    the next number, so that rounding on either side of it changes nothing. Others are divided by
    the budget.
    """
    if np.all(row == np.round(row)) and np.all(row < 2**53):
        common = math.gcd(*(int(value) for value in row))
        if common:
            return row / common, math.floor(budget / common) + 0.5
    return row / budget, 1.0


def _flat(table: Table) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=np.float64) for row in table])


def _one_of_each(sizes: Sequence[int]) -> csr_array:
    """Return the matrix whose rows sum the variables of a group each."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    count = len(group)
    return csr_array((np.ones(count), (group, np.arange(count))), shape=(len(sizes), count))


def _choice(values: np.ndarray, sizes: Sequence[int]) -> list[int]:
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return [int(np.argmax(part)) for part in parts]
