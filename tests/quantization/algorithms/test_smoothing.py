# SPDX-License-Identifier: Apache-2.0
"""Smoothing factors: the function stays, the difficulty moves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.formats.affine import fake_quantize
from modewright.formats.catalogue import format_named
from modewright.quantization.algorithms.max import max_scale
from modewright.quantization.algorithms.smoothing import awq_factors, smooth_factors

magnitudes = st.lists(
    st.tuples(st.floats(2**-10, 1024, width=32), st.floats(2**-10, 1024, width=32)),
    min_size=1,
    max_size=8,
)
shares = st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0])
both = pytest.mark.parametrize("factors", [smooth_factors, awq_factors], ids=["smooth", "awq"])


def layer(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with a few large channels, and weights."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 48, generator=generator)
    inputs[:, ::16] *= 40
    return inputs.to(dtype), torch.randn(32, 48, generator=generator).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str
)
@both
def test_the_function_stays(factors, dtype: torch.dtype, tolerance: float) -> None:  # type: ignore[no-untyped-def]
    inputs, weight = layer(dtype)
    found = factors(inputs.abs().amax(0), weight.abs().amax(0), 0.5).to(dtype)
    assert found.max() > 2 * found.min()
    before, after = inputs @ weight.T, (inputs / found) @ (weight * found).T
    assert (after - before).abs().max() <= tolerance * before.abs().max()


@given(pairs=magnitudes, alpha=shares)
def test_smooth_factors_are_their_formula(pairs: list[tuple[float, float]], alpha: float) -> None:
    inputs, weights = (torch.tensor(side) for side in zip(*pairs, strict=True))
    slow = [min(max(x**alpha / w ** (1 - alpha), 2**-14), 2**14) for x, w in pairs]
    assert smooth_factors(inputs, weights, alpha).tolist() == pytest.approx(slow, rel=1e-5)


@given(pairs=magnitudes, ratio=shares)
def test_awq_factors_are_their_formula_around_one(
    pairs: list[tuple[float, float]], ratio: float
) -> None:
    inputs, weights = (torch.tensor(side) for side in zip(*pairs, strict=True))
    raw = [x**ratio / w ** (1 - ratio) for x, w in pairs]
    slow = [value / math.sqrt(max(raw) * min(raw)) for value in raw]
    found = awq_factors(inputs, weights, ratio)
    assert found.tolist() == pytest.approx(slow, rel=1e-4)
    assert math.sqrt(found.max() * found.min()) == pytest.approx(1.0, rel=1e-5)


@given(pairs=magnitudes)
def test_one_half_makes_inputs_and_weights_equally_large(pairs: list[tuple[float, float]]) -> None:
    inputs, weights = (torch.tensor(side) for side in zip(*pairs, strict=True))
    found = smooth_factors(inputs, weights, 0.5)
    assert torch.allclose(inputs / found, weights * found, rtol=1e-5)


def test_one_makes_all_inputs_alike_and_zero_all_weights() -> None:
    inputs, weights = torch.tensor([1.0, 50.0, 0.2]), torch.tensor([0.3, 4.0, 1.0])
    assert torch.allclose(inputs / smooth_factors(inputs, weights, 1.0), torch.ones(3))
    assert torch.allclose(weights * smooth_factors(inputs, weights, 0.0), torch.ones(3))


@both
@pytest.mark.parametrize("dead", [0.0, math.nan, math.inf, -1.0], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["input", "weight"])
def test_channels_that_are_not_used_keep_their_size(factors, dead: float, side: int) -> None:  # type: ignore[no-untyped-def]
    sides = [torch.tensor([2.0, 3.0, 8.0]), torch.tensor([1.0, 1.0, 0.5])]
    kept = sides[0][1:].clone(), sides[1][1:].clone()
    sides[side][0] = dead
    for share in (0.0, 0.5, 1.0):
        found = factors(*sides, share)
        assert found[0] == 1.0
        assert torch.equal(found[1:], factors(*kept, share))


@both
def test_if_no_channel_is_used_all_factors_are_one(factors) -> None:  # type: ignore[no-untyped-def]
    assert factors(torch.zeros(4), torch.ones(4), 0.5).tolist() == [1.0] * 4


@both
@given(pairs=st.lists(st.tuples(st.floats(0, width=32), st.floats(0, width=32)), min_size=1))
def test_factors_are_always_positive_and_fit_float16(  # type: ignore[no-untyped-def]
    factors, pairs: list[tuple[float, float]]
) -> None:
    inputs, weights = (torch.tensor(side) for side in zip(*pairs, strict=True))
    for share in (0.0, 0.5, 1.0):
        found = factors(inputs, weights, share)
        assert ((found >= 2**-14) & (found <= 2**14)).all()
        assert torch.isfinite(found.half()).all()


def test_smoothing_lowers_the_error_of_eight_bit_inputs_and_weights() -> None:
    inputs, weight = layer(torch.float32)
    fmt = format_named("int8")

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        grouped = tensor.reshape(1, 1, -1)
        return fake_quantize(grouped, *max_scale(grouped, fmt), fmt).reshape(tensor.shape)

    def error(factors: torch.Tensor) -> float:
        result = rounded(inputs / factors) @ rounded(weight * factors).T
        return float((result - inputs @ weight.T).square().mean())

    smooth = smooth_factors(inputs.abs().amax(0), weight.abs().amax(0), 0.5)
    assert error(smooth) < 0.5 * error(torch.ones(48))


def test_the_best_ratio_lowers_the_error_of_weights() -> None:
    inputs, weight = layer(torch.float32)
    fmt = format_named("int4")

    def error(factors: torch.Tensor) -> float:
        grouped = (weight * factors).reshape(32, -1, 16)
        rounded = fake_quantize(grouped, *max_scale(grouped, fmt), fmt).reshape(weight.shape)
        return float(((inputs / factors) @ rounded.T - inputs @ weight.T).square().mean())

    means = inputs.abs().mean(0), weight.abs().mean(0)
    best = min(error(awq_factors(*means, ratio / 20)) for ratio in range(20))
    assert best < 0.7 * error(torch.ones(48))
