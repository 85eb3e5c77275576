# SPDX-License-Identifier: Apache-2.0
"""Rotations: orthogonal, and no entry larger than it has to be."""

from __future__ import annotations

import math

import pytest
import torch

from modewright.errors import ConfigError
from modewright.formats.affine import fake_quantize
from modewright.formats.catalogue import format_named
from modewright.quantization.algorithms.hadamard import (
    hadamard_matrix,
    largest_hadamard_block,
    random_orthogonal,
    randomized_hadamard,
    rotate_last,
)
from modewright.quantization.algorithms.max import max_scale

SIZES = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 48, 56, 60, 64, 76, 80, 96, 112, 128, 224, 576]
UNKNOWN = [3, 5, 6, 7, 10, 14, 52, 92, 130, 172, 1040]  # 1039 is prime: a matrix too large to keep


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_signs(n: int) -> list[list[int]]:
    """Hadamard matrices by their textbook definitions, entry by entry."""
    if n == 1:
        return [[1]]
    if n & (n - 1) == 0:
        half = slow_signs(n // 2)
        return [row + row for row in half] + [row + [-entry for entry in row] for row in half]
    prime = n - 1  # Paley's first construction

    def legendre(a: int) -> int:
        power = pow(a % prime, (prime - 1) // 2, prime)  # Euler's criterion
        return -1 if power == prime - 1 else power

    core = [[legendre(i - j) + (i == j) for j in range(prime)] for i in range(prime)]
    return [[1] * n] + [[-1, *row] for row in core]


@pytest.mark.parametrize("n", SIZES)
def test_rows_are_orthonormal_and_all_entries_equally_large(n: int) -> None:
    matrix = hadamard_matrix(n)
    assert matrix.dtype is torch.float64
    assert (matrix @ matrix.T - torch.eye(n)).abs().max() < 1e-12
    assert (matrix.abs() - 1 / math.sqrt(n)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 32, 44, 60, 256])
def test_matrices_agree_with_their_definition(n: int) -> None:
    assert hadamard_matrix(n).sign().tolist() == slow_signs(n)


def test_other_sizes_are_doubled() -> None:
    for n in (24, 40, 56):
        doubled = torch.kron(hadamard_matrix(n // 2), hadamard_matrix(2))
        assert torch.allclose(hadamard_matrix(n), doubled)


def test_the_determinant_is_the_largest_that_entries_up_to_one_allow() -> None:
    for n in (4, 12, 20, 28):  # Hadamard 1893: n ** (n / 2)
        _, logarithm = torch.linalg.slogdet(hadamard_matrix(n) * math.sqrt(n))
        assert logarithm.item() == pytest.approx(n / 2 * math.log(n))


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("base", [1, 12, 20, 28])
def test_the_sizes_of_common_models_are_known(base: int, k: int) -> None:
    assert largest_hadamard_block(base * 2**k) == base * 2**k


@pytest.mark.parametrize("n", [0, -4, *UNKNOWN])
def test_a_size_that_is_not_known_is_refused(n: int) -> None:
    with pytest.raises(ConfigError, match=f"size {n} is known"):
        hadamard_matrix(n)


@pytest.mark.parametrize(
    ("n", "block"),
    [(1, 1), (3, 1), (6, 2), (52, 4), (92, 4), (576, 576), (1536, 1536), (832, 832), (1040, 208)],
)
def test_the_largest_block_divides_and_is_known(n: int, block: int) -> None:
    assert largest_hadamard_block(n) == block
    with pytest.raises(ConfigError, match="1 or more"):
        largest_hadamard_block(-n)


@pytest.mark.parametrize("block", [1, 2, 12, 28, 64, 128, 192, 1280])
def test_rotating_is_multiplying_every_block_by_the_matrix(block: int) -> None:
    x = torch.randn(3, 2, 2 * block, dtype=torch.float64, generator=seeded())
    matrix = hadamard_matrix(block)
    slow = torch.cat([part @ matrix for part in x.split(block, dim=-1)], dim=-1)
    assert torch.allclose(rotate_last(x, block), slow, atol=1e-12)


@pytest.mark.parametrize("block", [4, 12, 28, 96])
def test_rotating_back_gives_what_there_was(block: int) -> None:
    x = torch.randn(5, 3 * block, generator=seeded())
    back = rotate_last(rotate_last(x, block), block, inverse=True)
    assert torch.allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rotating_keeps_shape_and_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 24, generator=seeded()).to(dtype)
    result = rotate_last(x, 12)
    assert (result.shape, result.dtype) == (x.shape, dtype)
    assert torch.equal(result, rotate_last(x.float(), 12).to(dtype))
    assert rotate_last(x[:0], 12).shape == (0, 5, 24)


def test_rotating_input_and_weight_leaves_a_layer_as_it_was() -> None:
    x = torch.randn(7, 48, dtype=torch.float64, generator=seeded(1))
    weight = torch.randn(9, 48, dtype=torch.float64, generator=seeded(2))
    rotated = rotate_last(x, 48) @ rotate_last(weight, 48).T
    assert torch.allclose(rotated, x @ weight.T, atol=1e-12)


def test_the_gradient_of_a_rotation_is_its_inverse() -> None:
    x = torch.randn(2, 24, dtype=torch.float64, generator=seeded(3), requires_grad=True)
    gradient = torch.randn(2, 24, dtype=torch.float64, generator=seeded(4))
    rotate_last(x, 12).backward(gradient)
    assert x.grad is not None
    assert torch.allclose(x.grad, rotate_last(gradient, 12, inverse=True))


def test_blocks_that_do_not_fill_the_axis_are_refused() -> None:
    with pytest.raises(ConfigError, match="blocks of 8 do not fill an axis of 12"):
        rotate_last(torch.ones(2, 12), 8)


@pytest.mark.parametrize("n", [1, 12, 64, 512])
def test_one_outlier_is_spread_over_all_channels(n: int) -> None:
    rotated = rotate_last(torch.eye(n, dtype=torch.float64), n)
    assert rotated.abs().max().item() == pytest.approx(n**-0.5)


def test_a_rotation_makes_outliers_cheaper_to_quantize() -> None:
    fmt = format_named("int4")
    x = torch.randn(64, 256, generator=seeded(5))
    x[:, 17] *= 50

    def error(rows: torch.Tensor) -> float:
        grouped = rows.unsqueeze(1)
        rounded = fake_quantize(grouped, *max_scale(grouped, fmt), fmt)
        return float((rounded - grouped).square().mean())

    assert error(rotate_last(x, 256)) < 0.5 * error(x)


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_random_rotations_are_orthogonal_and_repeatable(n: int) -> None:
    matrix = random_orthogonal(n, seeded(6))
    assert (matrix @ matrix.T - torch.eye(n)).abs().max() < 1e-12
    assert torch.equal(matrix, random_orthogonal(n, seeded(6)))
    assert n == 1 or not torch.equal(matrix, random_orthogonal(n, seeded(7)))


def test_random_rotations_favour_no_direction() -> None:
    # Haar measure: entries have mean 0 and variance 1/n. QR alone has a diagonal of one sign.
    generator = seeded(8)
    entries = torch.stack([random_orthogonal(4, generator) for _ in range(2000)])
    assert entries.mean(0).abs().max() < 0.05
    assert (entries.var(0) - 0.25).abs().max() < 0.03


@pytest.mark.parametrize("n", [1, 2, 3, 6, 13, 52, 64, 92, 100, 576])
def test_randomized_hadamard_is_orthogonal_for_any_size(n: int) -> None:
    matrix = randomized_hadamard(n, seeded(9))
    assert (matrix @ matrix.T - torch.eye(n)).abs().max() < 1e-12
    assert torch.equal(matrix, randomized_hadamard(n, seeded(9)))
    assert matrix.abs().max().item() <= largest_hadamard_block(n) ** -0.5 + 1e-12


def test_signs_of_a_randomized_hadamard_differ_from_seed_to_seed() -> None:
    one, other = randomized_hadamard(16, seeded(1)), randomized_hadamard(16, seeded(2))
    assert not torch.equal(one, other)
    assert torch.allclose(one.abs(), other.abs())
