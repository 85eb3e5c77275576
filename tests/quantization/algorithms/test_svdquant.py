# SPDX-License-Identifier: Apache-2.0
"""Branches of low rank: never worse than none, and as good as exact decompositions make them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from modewright.errors import ConfigError, DataError
from modewright.formats.affine import fake_quantize
from modewright.formats.catalogue import NumberFormat, format_named
from modewright.quantization.algorithms.max import max_scale
from modewright.quantization.algorithms.svdquant import low_rank, truncated_svd


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers(seed: int) -> torch.Tensor:
    """A weight with a few large columns, as models have them."""
    weight = normal(seed, 48, 64) * 0.02
    weight[:, ::20] *= 10
    return weight


class RoundTo:
    """Max-scaled fake quantization in groups of 16."""

    def __init__(self, name: str) -> None:
        self.format: NumberFormat = format_named(name)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        grouped = weight.reshape(len(weight), -1, 16)
        return fake_quantize(grouped, *max_scale(grouped, self.format), self.format).reshape(
            weight.shape
        )


def error(
    weight: torch.Tensor,
    branch: tuple[torch.Tensor, torch.Tensor] | None,
    quantizer: RoundTo,
    importance: torch.Tensor | None = None,
) -> float:
    product = torch.zeros(()) if branch is None else branch[0].float() @ branch[1].float()
    change = quantizer((weight.float() - product).to(weight.dtype)).float() + product - weight
    weights = 1.0 if importance is None else importance
    return float((change.square() * weights).sum())


def slow_error(weight: np.ndarray, rank: int, rounds: int, importance: np.ndarray) -> float:
    """What alternating exact decompositions reach with int4 in groups of 16, by loops."""

    def rounded(matrix: np.ndarray) -> np.ndarray:
        result = matrix.copy()
        for row in range(len(matrix)):
            for start in range(0, matrix.shape[1], 16):
                group = matrix[row, start : start + 16]
                scale = abs(group).max() / 7
                result[row, start : start + 16] = np.clip(np.rint(group / scale), -8, 7) * scale
        return result

    def cost(product: np.ndarray) -> float:
        change = rounded(weight - product) + product - weight
        return float((change**2 * importance).sum())

    best, target = cost(np.zeros_like(weight)), weight
    for _ in range(1 + rounds):
        left, values, right = np.linalg.svd(target * np.sqrt(importance), full_matrices=False)
        product = (left[:, :rank] * values[:rank]) @ right[:rank] / np.sqrt(importance)
        best = min(best, cost(product))
        target = weight - rounded(weight - product)
    return best


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("rank", [2, 8])
def test_it_is_as_good_as_with_exact_decompositions(rank: int, weighted: bool) -> None:
    weight = outliers(1)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1
    importance = importance if weighted else torch.ones(64)
    branch = low_rank(weight, rank, RoundTo("int4"), 4, importance)
    found = error(weight, branch, RoundTo("int4"), importance)
    slow = slow_error(weight.double().numpy(), rank, 4, importance.double().numpy())
    assert found == pytest.approx(slow, rel=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["int2", "int4", "int8", "uint4", "fp4_e2m1", "nf4"])
def test_it_is_never_worse_than_no_branch(name: str, dtype: torch.dtype) -> None:
    quantizer = RoundTo(name)
    for seed in range(4):
        weight = (outliers(seed) if seed % 2 else normal(seed, 32, 32)).to(dtype)
        importance = normal(seed, weight.shape[1]).square()
        branch = low_rank(weight, 4, quantizer, importance=importance)
        none = error(weight, None, quantizer, importance)
        assert error(weight, branch, quantizer, importance) <= none * 1.0001


def test_outliers_are_worth_a_branch() -> None:
    weight, quantizer = outliers(5), RoundTo("int4")
    with_branch = error(weight, low_rank(weight, 4, quantizer), quantizer)
    assert with_branch < 0.4 * error(weight, None, quantizer)


def test_importance_moves_the_error_to_where_it_counts_less() -> None:
    weight, quantizer = normal(6, 48, 64), RoundTo("int4")
    importance = torch.full((64,), 0.01)
    importance[:8] = 100.0
    plain = error(weight, low_rank(weight, 8, quantizer), quantizer, importance)
    weighted = low_rank(weight, 8, quantizer, importance=importance)
    assert error(weight, weighted, quantizer, importance) < 0.5 * plain


def test_a_weight_of_low_rank_is_all_branch() -> None:
    weight = normal(7, 40, 3) @ normal(8, 3, 32)
    up, down = low_rank(weight, 3, RoundTo("int2"))
    assert torch.allclose(up @ down, weight, atol=1e-4)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (9, 9)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_the_product_is_almost_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    # Eckart and Young 1936: what the best one leaves is the rest of the singular values.
    matrix = normal(9, *shape)
    up, down = truncated_svd(matrix, rank)
    left = (matrix - up @ down).square().sum().item()
    best = torch.linalg.svdvals(matrix)[rank:].square().sum().item()
    assert best - 1e-3 <= left <= best * 1.02 + 1e-3
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))


def test_it_is_the_same_whatever_the_global_seed_is() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = low_rank(outliers(10), 4, RoundTo("int4"))
        torch.manual_seed(2)
        state = torch.get_rng_state()
        other = low_rank(outliers(10), 4, RoundTo("int4"))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("fill", [0.0, 0.5], ids=["zeros", "constant"])
def test_a_weight_that_quantizes_exactly_needs_no_branch(fill: float) -> None:
    up, down = low_rank(torch.full((8, 16), fill), 2, RoundTo("int4"))
    assert torch.count_nonzero(up @ down) == 0


def test_inputs_that_are_never_used_do_no_harm() -> None:
    weight, quantizer = outliers(11), RoundTo("int4")
    for importance in (torch.zeros(64), torch.arange(64) % 2):
        branch = low_rank(weight, 4, quantizer, importance=importance)
        assert all(part.isfinite().all() for part in branch)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_does_not_exist_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"1 to 8; received {rank}"):
        low_rank(torch.ones(8, 16), rank, RoundTo("int4"))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="NaN or infinite"):
        low_rank(torch.full((16, 16), math.nan), 2, RoundTo("int4"))
