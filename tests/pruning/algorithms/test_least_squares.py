# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modewright.pruning.algorithms.least_squares import removal_order, ridge, unit_costs


def problem(
    seed: int, inputs: int = 8, outputs: int = 5, rows: int = 60
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) + torch.eye(inputs)
    x = torch.randn(rows, inputs, generator=generator) @ mixing
    return x, torch.randn(outputs, inputs, generator=generator), x.t() @ x


def least_error(weight: torch.Tensor, x: torch.Tensor, kept: list[int]) -> float:
    """The squared error that the best weight on the kept inputs leaves, by NumPy's solver."""
    target = (x @ weight.t()).double().numpy()
    inputs = x[:, kept].double().numpy()
    solution = np.linalg.lstsq(inputs, target, rcond=None)[0]
    return float(((inputs @ solution - target) ** 2).sum())


@given(seed=st.integers(0, 10**6), damping=st.sampled_from([1e-3, 0.1, 2.0]))
@settings(max_examples=15)
def test_ridge_is_the_least_squares_solution_with_rows_for_the_damping(
    seed: int, damping: float
) -> None:
    x, weight, hessian = problem(seed)
    wanted = torch.randn(60, 5, generator=torch.Generator().manual_seed(seed + 1))

    found = ridge(weight, hessian, wanted.t() @ x, damping)

    root = float(damping * hessian.diagonal().mean()) ** 0.5
    rows = np.vstack([x.double().numpy(), root * np.eye(8)])
    targets = np.vstack([wanted.double().numpy(), root * weight.t().double().numpy()])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-3)


def test_ridge_leaves_a_weight_that_is_right_as_it_is() -> None:
    x, weight, hessian = problem(1)

    found = ridge(weight, hessian, (x @ weight.t()).t() @ x, 0.01)

    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 10**6), width=st.sampled_from([1, 2, 4]))
@settings(max_examples=15)
def test_cost_of_a_unit_is_the_error_that_the_best_weight_without_it_leaves(
    seed: int, width: int
) -> None:
    x, weight, hessian = problem(seed)
    units = torch.arange(8).reshape(-1, width)

    costs = unit_costs(weight, hessian, units, 1e-7)

    for unit, inputs in enumerate(units.tolist()):
        kept = [i for i in range(8) if i not in inputs]
        assert float(costs[unit]) == pytest.approx(least_error(weight, x, kept), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_order_one_at_a_time_is_that_of_slow_elimination(seed: int) -> None:
    x, weight, hessian = problem(seed)
    left, expected = list(range(8)), []
    while len(left) > 2:
        errors = {u: least_error(weight, x, [i for i in left if i != u]) for u in left}
        gone = min(errors, key=lambda u: errors[u])
        left.remove(gone)
        expected.append(gone)

    units = torch.arange(8)[:, None]
    assert removal_order(weight, hessian, units, damping=1e-7, minimum=2, rounds=8) == expected


def test_of_two_inputs_that_are_alike_only_one_goes() -> None:
    x, weight, _ = problem(3)
    x[:, 5] = x[:, 2] * 1.001  # either can stand in for the other; without both much is lost
    x[:, [2, 5]] *= 10
    hessian = x.t() @ x

    order = removal_order(weight, hessian, torch.arange(8)[:, None], damping=1e-6, minimum=5)

    assert len({2, 5} & set(order)) == 1
    assert order[0] in (2, 5)


def test_order_is_nested_and_never_goes_below_the_minimum() -> None:
    _, weight, hessian = problem(4, inputs=12)
    units = torch.arange(12).reshape(6, 2)

    order = removal_order(weight, hessian, units, damping=1e-3, minimum=2, rounds=3)

    assert len(order) == len(set(order)) == 4


def test_inputs_that_are_never_used_cost_nothing_and_go_first() -> None:
    _, weight, hessian = problem(5)
    weight[:, [1, 6]] = 0
    hessian[[3], :] = hessian[:, [3]] = 0  # an input that is always zero

    order = removal_order(weight, hessian, torch.arange(8)[:, None], damping=1e-5, minimum=4)

    assert set(order[:3]) == {1, 3, 6}


def test_the_first_units_removed_leave_nearly_the_least_error_of_all_choices() -> None:
    x, weight, hessian = problem(6)
    order = removal_order(weight, hessian, torch.arange(8)[:, None], damping=1e-7, minimum=5)
    best = min(
        least_error(weight, x, [i for i in range(8) if i not in gone])
        for gone in itertools.combinations(range(8), 3)
    )

    assert least_error(weight, x, [i for i in range(8) if i not in order]) <= 1.3 * best
