# SPDX-License-Identifier: Apache-2.0
"""Affine quantization against a readable reference, torch, and what must hold for any quantizer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.errors import ConfigError
from modewright.formats.affine import dequantize, fake_quantize, quantize, scale_from_range
from modewright.formats.integer import ALL_INTEGER_FORMATS, IntegerFormat, integer_format
from modewright.formats.reference import fake_quantize_group
from modewright.quantization.algorithms.max import max_scale

every_format = pytest.mark.parametrize("fmt", ALL_INTEGER_FORMATS, ids=lambda fmt: fmt.name)
# Ranges whose width is a float32; what happens beyond is tested by name below.
finite = st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=True)


def through(values: list[float], fmt: IntegerFormat) -> list[float]:
    grouped = torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1)
    scale, zero_point = max_scale(grouped, fmt)
    return fake_quantize(grouped, scale, zero_point, fmt).flatten().tolist()


@every_format
@given(values=st.lists(finite, min_size=1, max_size=12))
def test_fast_path_is_the_reference_bit_for_bit(fmt: IntegerFormat, values: list[float]) -> None:
    assert through(values, fmt) == fake_quantize_group(values, fmt)


@every_format
def test_random_groups_are_the_reference_bit_for_bit(fmt: IntegerFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    for spread in (1e-6, 1.0, 1e6):
        values = (torch.randn(512, generator=generator) * spread).tolist()
        assert through(values, fmt) == fake_quantize_group(values, fmt)


@every_format
def test_torch_gives_the_same_per_channel(fmt: IntegerFormat) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    scale, zero_point = max_scale(weight.unsqueeze(1), fmt)
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point

    own = fake_quantize(weight.unsqueeze(1), scale, zero_point, fmt).squeeze(1)
    theirs = torch.fake_quantize_per_channel_affine(
        weight, scale.flatten(), zeros.flatten().int(), 0, fmt.qmin, fmt.qmax
    )

    # torch multiplies by 1/scale where we divide: a value halfway between two codes may differ
    differing = own != theirs
    assert differing.float().mean() < 0.01
    assert ((own - theirs).abs() <= 1.001 * scale)[differing.nonzero()[:, 0]].all()


@every_format
def test_every_code_survives(fmt: IntegerFormat) -> None:
    codes = torch.arange(fmt.qmin, fmt.qmax + 1, dtype=torch.float32).reshape(1, 1, -1)
    scale = torch.tensor([[0.37]])
    zero_point = None if fmt.signed else torch.tensor([[3.0]])

    assert torch.equal(
        quantize(dequantize(codes, scale, zero_point), scale, zero_point, fmt), codes
    )


@every_format
@given(values=st.lists(finite, min_size=1, max_size=12))
def test_max_scales_move_no_value_by_more_than_half_a_step(
    fmt: IntegerFormat, values: list[float]
) -> None:
    grouped = torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1)
    scale, zero_point = max_scale(grouped, fmt)

    moved = (fake_quantize(grouped, scale, zero_point, fmt).double() - grouped.double()).abs()

    # a zero point is itself rounded, which may cost the ends of the range another half step
    steps = 0.5 if fmt.signed else 1.0
    assert (moved <= scale.double() * steps * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "fmt", [f for f in ALL_INTEGER_FORMATS if f.num_bits < 8], ids=lambda fmt: fmt.name
)
def test_more_bits_never_move_values_further(fmt: IntegerFormat) -> None:
    wider = integer_format(fmt.num_bits + 1, symmetric=fmt.signed)
    grouped = torch.randn(64, 1, 256, generator=torch.Generator().manual_seed(0))

    def error(f: IntegerFormat) -> torch.Tensor:
        return (fake_quantize(grouped, *max_scale(grouped, f), f) - grouped).norm(dim=-1)

    assert (error(wider) < error(fmt)).all()


@every_format
def test_quantizing_twice_changes_nothing(fmt: IntegerFormat) -> None:
    grouped = torch.randn(8, 4, 32, generator=torch.Generator().manual_seed(0))
    scale, zero_point = max_scale(grouped, fmt)
    once = fake_quantize(grouped, scale, zero_point, fmt)

    assert torch.equal(fake_quantize(once, scale, zero_point, fmt), once)


@every_format
def test_zero_is_exact(fmt: IntegerFormat) -> None:
    assert through([0.0, 5.0, 11.0], fmt)[0] == 0.0
    assert through([0.0, 0.0], fmt) == [0.0, 0.0]
    assert through([-0.0], fmt) == [0.0]


@every_format
def test_nan_stays_nan_and_infinity_saturates(fmt: IntegerFormat) -> None:
    grouped = torch.tensor([[[math.nan, math.inf, -math.inf, 1.0]]])
    scale = torch.ones(1, 1)
    zero_point = None if fmt.signed else torch.ones(1, 1)

    nan, high, low, _ = fake_quantize(grouped, scale, zero_point, fmt).flatten().tolist()

    offset = 0 if fmt.signed else 1
    assert math.isnan(nan)
    assert (high, low) == (fmt.qmax - offset, fmt.qmin - offset)


@every_format
@pytest.mark.parametrize("shape", [(0, 1, 4), (3, 0, 4), (3, 1, 0)], ids=str)
def test_an_empty_tensor_stays_empty(fmt: IntegerFormat, shape: tuple[int, int, int]) -> None:
    grouped = torch.empty(shape)
    scale, zero_point = max_scale(grouped, fmt)

    assert scale.shape == shape[:2]
    assert fake_quantize(grouped, scale, zero_point, fmt).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_tensor_is_kept(dtype: torch.dtype) -> None:
    fmt = integer_format(8, symmetric=True)
    grouped = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero_point = max_scale(grouped, fmt)

    result = fake_quantize(grouped, scale, zero_point, fmt)

    assert scale.dtype == torch.float32
    assert result.dtype == dtype
    exact = fake_quantize(grouped.float(), scale, zero_point, fmt)
    assert torch.equal(result, exact.to(dtype))


def test_an_asymmetric_range_is_covered_from_end_to_end() -> None:
    fmt = integer_format(8, symmetric=False)
    scale, zero_point = scale_from_range(torch.tensor([[-1.0]]), torch.tensor([[3.0]]), fmt)

    assert zero_point is not None
    assert scale.item() == pytest.approx(4 / 255)
    assert zero_point.item() == round(255 / 4)


def test_an_asymmetric_range_wider_than_float32_is_still_finite() -> None:
    fmt = integer_format(8, symmetric=False)
    top = torch.finfo(torch.float32).max
    scale, zero_point = scale_from_range(torch.tensor([[-top]]), torch.tensor([[top]]), fmt)

    assert zero_point is not None
    assert torch.isfinite(scale).all()
    assert torch.isfinite(zero_point).all()


@every_format
def test_the_gradient_passes_straight_through_where_nothing_saturated(fmt: IntegerFormat) -> None:
    inside, outside = 0.3 * fmt.qmax, 3.0 * fmt.qmax
    grouped = torch.tensor([[[inside, outside]]], requires_grad=True)
    zero_point = None if fmt.signed else torch.zeros(1, 1)

    fake_quantize(grouped, torch.ones(1, 1), zero_point, fmt).backward(torch.full((1, 1, 2), 7.0))

    assert grouped.grad is not None
    assert grouped.grad.flatten().tolist() == [7.0, 0.0]


def test_there_is_no_format_of_nine_bits() -> None:
    with pytest.raises(ConfigError, match="2 to 8; received 9"):
        integer_format(9, symmetric=True)


@every_format
def test_the_catalogue_knows_its_codes(fmt: IntegerFormat) -> None:
    assert fmt.qmax - fmt.qmin + 1 == 2**fmt.num_bits
    assert (fmt.qmin < 0) == fmt.signed
    assert integer_format(fmt.num_bits, symmetric=fmt.signed) is fmt
