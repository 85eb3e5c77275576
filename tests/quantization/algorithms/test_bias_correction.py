# SPDX-License-Identifier: Apache-2.0
"""Bias correction: the mean error of the output is zero afterwards."""

from __future__ import annotations

import pytest
import torch

from modewright.formats.affine import fake_quantize
from modewright.formats.catalogue import format_named
from modewright.quantization.algorithms.bias_correction import bias_shift
from modewright.quantization.algorithms.max import max_scale


def layer(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 24, generator=generator).relu().to(dtype)
    weight = torch.randn(10, 24, generator=generator).to(dtype)
    grouped = weight.unsqueeze(1)
    fmt = format_named("int3")
    return inputs, weight, fake_quantize(grouped, *max_scale(grouped, fmt), fmt).squeeze(1)


def test_the_mean_output_is_exactly_that_of_the_original() -> None:
    inputs, weight, quantized = layer()
    shift = bias_shift(inputs.mean(0), weight, quantized)
    before = (inputs @ weight.T - inputs @ quantized.T).mean(0)
    after = (inputs @ weight.T - (inputs @ quantized.T + shift)).mean(0)
    assert before.abs().max() > 0.05
    assert after.abs().max() < 1e-13


def test_the_squared_error_shrinks_by_the_square_of_the_mean_error() -> None:
    inputs, weight, quantized = layer()
    change = inputs @ quantized.T - inputs @ weight.T
    shift = bias_shift(inputs.mean(0), weight, quantized)
    gained = change.square().mean(0) - (change + shift).square().mean(0)
    assert torch.allclose(gained, change.mean(0).square())


def test_it_agrees_with_adding_up_one_product_at_a_time() -> None:
    inputs, weight, quantized = layer()
    means = inputs.mean(0).tolist()
    slow = [
        sum((a - b) * mean for a, b, mean in zip(*rows, means, strict=True))
        for rows in zip(weight.tolist(), quantized.tolist(), strict=True)
    ]
    assert bias_shift(inputs.mean(0), weight, quantized).tolist() == pytest.approx(slow)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_arithmetic_is_at_least_float32(dtype: torch.dtype) -> None:
    inputs, weight, quantized = layer(dtype)
    shift = bias_shift(inputs.mean(0), weight, quantized)
    assert shift.dtype is torch.float32
    exact = bias_shift(inputs.mean(0).double(), weight, quantized)
    assert torch.allclose(shift.double(), exact, rtol=1e-4, atol=1e-6)
