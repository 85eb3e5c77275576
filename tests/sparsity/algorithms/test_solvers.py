"""SparseGPT, the refit and ALPS against slow references, theorems and torch's own solver."""

from __future__ import annotations

import itertools

import pytest
import torch

from modewright.least_squares import damped, output_error
from modewright.sparsity.algorithms.alps import alps
from modewright.sparsity.algorithms.masks import choose_mask, follows
from modewright.sparsity.algorithms.refit import refit
from modewright.sparsity.algorithms.scores import magnitude_scores, wanda_scores
from modewright.sparsity.algorithms.sparsegpt import sparsegpt
from modewright.sparsity.pattern import Pattern, parse_pattern

DAMPING = 0.01
PATTERNS = ["2:4", "4:8", "unstructured", "2x4"]


def problem(
    seed: int = 0, outputs: int = 12, inputs: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs of unlike power."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=draw)
    power = torch.rand(inputs, generator=draw) * 3
    rows = torch.randn(200, inputs, generator=draw) @ mixing * power
    return torch.randn(outputs, inputs, generator=draw), rows.t() @ rows


def loss(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(output_error(weight, other, damped(hessian, DAMPING)).sum())


def slow_sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal brain surgery in order: after each column the inverse of what is left, by itself."""
    regular = damped(hessian.double(), DAMPING)
    values = weight.double().clone()
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    inputs = weight.shape[1]
    compared = pattern.of or inputs
    losses = torch.stack(
        [torch.linalg.inv(regular[i:, i:])[0, 0] for i in range(inputs)]
    )  # 1 / what a unit of column i costs when all later ones make up for it
    for column in range(inputs):
        if column % compared == 0:
            part = slice(column, column + compared)
            mask[:, part] = choose_mask(values[:, part] ** 2 / losses[part], pattern, 0.5)
        inverse = torch.linalg.inv(regular[column:, column:])
        for row in range(len(weight)):
            if not mask[row, column]:
                values[row, column:] -= values[row, column] / inverse[0, 0] * inverse[0]
                values[row, column] = 0
    return values.float(), mask


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(pattern: str) -> None:
    weight, hessian = problem()
    parsed = parse_pattern(pattern)

    values, mask = sparsegpt(weight, hessian, parsed, damping=DAMPING)
    expected, expected_mask = slow_sparsegpt(weight, hessian, parsed)

    assert torch.equal(mask, expected_mask)
    assert torch.allclose(values, expected, atol=1e-3)


def test_columns_beyond_a_run_make_up_for_those_in_it() -> None:
    weight, hessian = problem(inputs=300)
    mask = choose_mask(magnitude_scores(weight), parse_pattern("2:4"))

    values, kept = sparsegpt(weight, hessian, parse_pattern("2:4"), damping=DAMPING, mask=mask)
    one_run = weight.double().clone()
    inverse = torch.linalg.inv(damped(hessian.double(), DAMPING))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for column in range(300):
        error = one_run[:, column] * ~mask[:, column] / factor[column, column]
        one_run[:, column:] -= error[:, None] * factor[column, column:]
    one_run *= mask

    assert torch.equal(kept, mask)
    assert torch.allclose(values.double(), one_run, atol=2e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_every_step_up_loses_less(pattern: str, seed: int) -> None:
    weight, hessian = problem(seed, outputs=16)
    parsed = parse_pattern(pattern)
    mask = choose_mask(magnitude_scores(weight), parsed)

    magnitude = loss(weight, weight * mask, hessian)
    same_mask = sparsegpt(weight, hessian, parsed, damping=DAMPING, mask=mask)[0]
    own_mask, chosen = sparsegpt(weight, hessian, parsed, damping=DAMPING)
    best, best_mask = alps(weight, hessian, parsed, damping=DAMPING)

    assert loss(weight, same_mask, hessian) < magnitude
    assert loss(weight, own_mask, hessian) < magnitude
    assert loss(weight, best, hessian) < 0.9 * loss(weight, own_mask, hessian)
    for found, where in ((own_mask, chosen), (best, best_mask)):
        assert follows(where, parsed)
        assert torch.equal(found, found * where)
        assert int(where.sum()) == weight.numel() // 2


def test_alps_comes_near_the_best_mask_of_all() -> None:
    weight, hessian = problem(outputs=20, inputs=8)
    regular = damped(hessian, DAMPING).double()
    best = torch.full((20,), torch.inf, dtype=torch.float64)
    for kept in itertools.product(itertools.combinations(range(4), 2), repeat=2):
        support = [*kept[0], *(i + 4 for i in kept[1])]
        solved = torch.linalg.solve(
            regular[support][:, support], regular[support] @ weight.double().t()
        )
        values = torch.zeros(20, 8, dtype=torch.float64)
        values[:, support] = solved.t()
        best = torch.minimum(best, output_error(weight, values, regular))

    found, _ = alps(weight, hessian, parse_pattern("2:4"), damping=DAMPING)
    greedy, _ = sparsegpt(weight, hessian, parse_pattern("2:4"), damping=DAMPING)

    assert float(best.sum()) <= loss(weight, found, hessian) * 1.001
    assert loss(weight, found, hessian) < 1.5 * float(best.sum())
    assert loss(weight, greedy, hessian) > loss(weight, found, hessian)


def test_the_refit_is_what_a_least_squares_solver_finds() -> None:
    weight, _ = problem(inputs=16)
    draw = torch.Generator().manual_seed(5)
    rows = torch.randn(100, 16, generator=draw) @ torch.randn(16, 16, generator=draw)
    mask = torch.rand(weight.shape, generator=draw) > 0.5

    found = refit(weight, rows.t() @ rows, mask, weight * mask, damping=1e-9, iterations=60)

    for row, kept, own in zip(weight, mask, found, strict=True):
        expected = torch.linalg.lstsq(rows[:, kept], rows @ row).solution
        assert torch.allclose(own[kept], expected, atol=1e-2)
        assert not own[~kept].any()


def test_every_step_of_the_refit_loses_less() -> None:
    weight, hessian = problem()
    mask = choose_mask(magnitude_scores(weight), parse_pattern("2:4"))
    losses = [
        loss(weight, refit(weight, hessian, mask, weight, iterations=steps), hessian)
        for steps in range(8)
    ]

    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(loss(weight, weight * mask, hessian))
    assert losses[-1] < 0.8 * losses[0]


def test_wanda_is_best_if_inputs_are_not_correlated() -> None:
    weight, hessian = problem()
    diagonal = torch.diag(hessian.diagonal())
    pattern = parse_pattern("2:4")

    mask = choose_mask(wanda_scores(weight, hessian), pattern)
    _, chosen = sparsegpt(weight, diagonal, pattern, damping=1e-9)

    assert torch.equal(mask, chosen)


def test_an_input_that_is_never_there_changes_nothing() -> None:
    weight, hessian = problem(inputs=8)
    hessian[2], hessian[:, 2] = 0, 0

    for found, _ in (
        sparsegpt(weight, hessian, parse_pattern("2:4")),
        alps(weight, hessian, parse_pattern("2:4")),
    ):
        assert torch.isfinite(found).all()
