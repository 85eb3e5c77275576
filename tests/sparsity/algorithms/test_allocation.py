from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog

from modewright.sparsity.algorithms.allocation import allocate, score_levels


def layers() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.rand(2000, generator=draw) ** 4,  # most are worth nothing
        torch.rand(1000, generator=draw) + 0.5,  # all are worth alike
        torch.rand(3000, generator=draw),
    ]


def lost(scores: torch.Tensor, sparsity: float) -> float:
    ranked = scores.sort().values
    return float(ranked[: round(len(ranked) * sparsity)].sum() / ranked.sum())


def test_the_budget_is_met_and_layers_that_lose_less_give_more() -> None:
    scores = layers()
    sizes = [len(s) for s in scores]

    parts = allocate([score_levels(s) for s in scores], sizes, 0.5, 0.4)

    assert sum(p * n for p, n in zip(parts, sizes, strict=True)) / 6000 == pytest.approx(0.5)
    assert parts[0] > parts[2] > parts[1]
    assert sum(map(lost, scores, parts)) < sum(lost(s, 0.5) for s in scores)
    assert min(parts) >= 0.1 - 1e-9
    assert max(parts) <= 0.9 + 1e-9


def test_no_span_is_uniform_and_alike_layers_get_alike() -> None:
    scores = layers()
    sizes = [len(s) for s in scores]
    levels = [score_levels(s) for s in scores]

    assert allocate(levels, sizes, 0.5, 0.0) == pytest.approx([0.5] * 3)
    assert allocate([levels[0]] * 3, [5, 5, 5], 0.3, 0.2) == pytest.approx([0.3] * 3, abs=1e-3)


def test_no_other_allocation_loses_less() -> None:
    """The loss of a layer is convex in its sparsity: a linear program over pieces is an oracle."""
    scores = layers()
    sizes = [len(s) for s in scores]
    levels = [score_levels(s) for s in scores]
    steps = len(levels[0])
    cost = torch.cat([level * n / steps for level, n in zip(levels, sizes, strict=True)])
    weight = torch.cat([torch.full((steps,), n / steps) for n in sizes])
    solved = linprog(cost.numpy(), A_eq=weight[None].numpy(), b_eq=[3000], bounds=(0, 1))
    best = torch.tensor(solved.x).reshape(3, steps).mean(1)

    assert allocate(levels, sizes, 0.5, 0.5) == pytest.approx(best.tolist(), abs=2e-3)
