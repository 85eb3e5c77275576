# SPDX-License-Identifier: Apache-2.0
"""Scales, codes and what is left of values: against the reference, torch and the stated bounds.

Most of it is about integers; what holds for every format is tested in ``tests/contracts`` too.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.errors import ConfigError
from modewright.formats.affine import dequantize, fake_quantize, quantize
from modewright.formats.catalogue import FORMATS, NumberFormat, format_named, reach, round_to
from modewright.formats.integer import ALL_INTEGER_FORMATS, IntegerFormat, integer_format
from modewright.formats.reference import fake_quantize_group
from modewright.formats.scaling import scale_from_range
from modewright.quantization.algorithms.max import max_scale

LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149
EDGES = (0.0, -0.0, SMALLEST, -SMALLEST, 2.0**-126, -(2.0**-126), LARGEST, -LARGEST, 1e38, -3e38)
INTEGERS = [pytest.param(fmt, id=fmt.name) for fmt in ALL_INTEGER_FORMATS]
SIGNED = [pytest.param(fmt, id=fmt.name) for fmt in ALL_INTEGER_FORMATS if fmt.signed]
UNSIGNED = [pytest.param(fmt, id=fmt.name) for fmt in ALL_INTEGER_FORMATS if not fmt.signed]

formats = st.sampled_from(ALL_INTEGER_FORMATS)
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(EDGES)
ordinary = st.floats(-1000, 1000, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
groups = st.lists(float32s, min_size=1, max_size=12) | st.lists(ordinary, min_size=1, max_size=12)
ordinary_groups = st.lists(ordinary, min_size=1, max_size=12)


def one_group(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).reshape(1, 1, -1)


def max_scaled(grouped: torch.Tensor, fmt: IntegerFormat) -> torch.Tensor:
    return fake_quantize(grouped, *max_scale(grouped, fmt), fmt)


def random_groups(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(values=groups, fmt=formats)
def test_the_fast_path_equals_the_reference_exactly(
    values: list[float], fmt: IntegerFormat
) -> None:
    fast = max_scaled(one_group(values), fmt).flatten()
    slow = torch.tensor(fake_quantize_group(values, fmt))
    assert torch.equal(fast, slow)  # -0.0 equals 0.0: a code, an integer, has no sign for zero


@pytest.mark.parametrize("fmt", INTEGERS)
def test_the_fast_path_equals_the_reference_on_many_random_groups(fmt: IntegerFormat) -> None:
    scales = torch.logspace(-30, 30, 24).reshape(-1, 1, 1)
    grouped = random_groups(fmt.num_bits, 24, 1, 16) * scales
    slow = [fake_quantize_group(row.flatten().tolist(), fmt) for row in grouped]
    assert torch.equal(max_scaled(grouped, fmt).flatten(1), torch.tensor(slow))


@pytest.mark.parametrize("fmt", INTEGERS)
@pytest.mark.parametrize("exponent", [-9, 0, 5], ids=lambda e: f"scale 2**{e}")
def test_per_channel_agrees_with_torch_where_both_round_the_same_quotient(
    fmt: IntegerFormat, exponent: int
) -> None:
    # With a power of two as scale, torch's multiplication by 1/scale is a division.
    scale = torch.full((5, 1), 2.0**exponent)
    zero_point = None if fmt.signed else torch.arange(5.0).clamp(max=fmt.qmax).reshape(5, 1)
    grouped = random_groups(1, 5, 1, 64) * 2.0**exponent * fmt.qmax
    points = torch.zeros(5) if zero_point is None else zero_point.flatten()
    theirs = torch.fake_quantize_per_channel_affine(
        grouped, scale.flatten(), points.int(), 0, fmt.qmin, fmt.qmax
    )
    assert torch.equal(fake_quantize(grouped, scale, zero_point, fmt), theirs)


@pytest.mark.parametrize("fmt", UNSIGNED)
def test_ties_are_rounded_before_the_zero_point_is_added_as_torch_does(fmt: IntegerFormat) -> None:
    ties = one_group([-0.5, 0.5, 1.5])
    ours = fake_quantize(ties, torch.ones(1, 1), torch.ones(1, 1), fmt)
    theirs = torch.fake_quantize_per_tensor_affine(ties, 1.0, 1, 0, fmt.qmax)
    assert ours.flatten().tolist() == theirs.flatten().tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize("fmt", INTEGERS)
def test_per_tensor_agrees_with_torch_up_to_one_code_at_ties(fmt: IntegerFormat) -> None:
    grouped = random_groups(2, 1, 1, 512)
    scale, zero_point = max_scale(grouped, fmt)
    theirs = torch.fake_quantize_per_tensor_affine(
        grouped,
        scale.item(),
        0 if zero_point is None else int(zero_point.item()),
        fmt.qmin,
        fmt.qmax,
    )
    ours = fake_quantize(grouped, scale, zero_point, fmt)
    quotient = grouped / scale
    tie = (quotient - quotient.floor() - 0.5).abs() < 1e-4
    assert torch.equal(ours[~tie], theirs[~tie])
    assert ((ours - theirs).abs() <= scale * 1.001).all()


@pytest.mark.parametrize("fmt", INTEGERS)
@pytest.mark.parametrize("scale", [1.0, 0.1, 3.7e-5, 1.3e30], ids=str)
def test_every_code_survives_dequantizing_and_quantizing(fmt: IntegerFormat, scale: float) -> None:
    codes = torch.arange(float(fmt.qmin), fmt.qmax + 1).reshape(1, 1, -1)
    scales = torch.full((1, 1), scale)
    for point in [None] if fmt.signed else [float(fmt.qmin), 1.0, float(fmt.qmax)]:
        zero_point = None if point is None else torch.full((1, 1), point)
        values = dequantize(codes, scales, zero_point)
        assert values.unique().numel() == 2**fmt.num_bits
        assert torch.equal(quantize(values, scales, zero_point, fmt), codes)


@given(values=ordinary_groups, fmt=formats)
def test_no_value_moves_by_more_than_half_a_scale(values: list[float], fmt: IntegerFormat) -> None:
    grouped = one_group(values)
    scale, zero_point = max_scale(grouped, fmt)
    error = (fake_quantize(grouped, scale, zero_point, fmt) - grouped).abs()
    rounding = grouped.abs().max() * 2.0**-21
    assert (error <= scale.unsqueeze(-1) / 2 + rounding).all()


@given(values=ordinary_groups, signed=st.booleans())
def test_more_bits_never_make_the_bound_of_the_error_larger(
    values: list[float], signed: bool
) -> None:
    grouped = one_group(values)
    scales = [max_scale(grouped, IntegerFormat(bits, signed))[0].item() for bits in range(2, 9)]
    assert scales == sorted(scales, reverse=True)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_more_bits_never_make_the_largest_error_of_a_large_group_larger(signed: bool) -> None:
    grouped = random_groups(3, 4, 2, 256)
    errors = [
        (max_scaled(grouped, IntegerFormat(bits, signed)) - grouped).abs().amax(dim=-1)
        for bits in range(2, 9)
    ]
    assert all((fewer >= more).all() for fewer, more in pairwise(errors))


@given(values=ordinary_groups, fmt=formats)
def test_quantizing_again_with_the_same_scale_changes_nothing(
    values: list[float], fmt: IntegerFormat
) -> None:
    grouped = one_group(values)
    scale, zero_point = max_scale(grouped, fmt)
    once = fake_quantize(grouped, scale, zero_point, fmt)
    assert torch.equal(fake_quantize(once, scale, zero_point, fmt), once)


@given(values=ordinary_groups, fmt=formats)
def test_codes_are_integers_in_the_range_of_the_format(
    values: list[float], fmt: IntegerFormat
) -> None:
    grouped = one_group(values)
    codes = quantize(grouped, *max_scale(grouped, fmt), fmt)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= fmt.qmin
    assert codes.max() <= fmt.qmax


@pytest.mark.parametrize("fmt", UNSIGNED)
@given(values=st.lists(float32s, min_size=1, max_size=8))
def test_zero_is_exact_in_formats_with_a_zero_point(
    fmt: IntegerFormat, values: list[float]
) -> None:
    assert max_scaled(one_group([*values, 0.0]), fmt).flatten()[-1] == 0


@pytest.mark.parametrize("fmt", INTEGERS)
def test_a_group_of_zeros_has_scale_one_and_stays_zero(fmt: IntegerFormat) -> None:
    grouped = torch.zeros(2, 3, 4)
    scale, _ = max_scale(grouped, fmt)
    assert torch.equal(scale, torch.ones(2, 3))
    assert torch.equal(max_scaled(grouped, fmt), grouped)


@pytest.mark.parametrize("fmt", INTEGERS)
def test_a_group_whose_scale_would_be_denormal_becomes_zero(fmt: IntegerFormat) -> None:
    grouped = one_group([SMALLEST, -SMALLEST, 2.0**-127])
    assert torch.equal(max_scaled(grouped, fmt), torch.zeros(1, 1, 3))


@pytest.mark.parametrize("fmt", INTEGERS)
def test_nan_stays_nan_and_its_neighbours_are_as_without_it(fmt: IntegerFormat) -> None:
    grouped = one_group([1.0, math.nan, -0.3])
    scale, zero_point = scale_from_range(torch.tensor([[-0.5]]), torch.tensor([[1.0]]), fmt)
    result = fake_quantize(grouped, scale, zero_point, fmt).flatten()
    assert result[1].isnan()
    alone = fake_quantize(one_group([1.0, -0.3]), scale, zero_point, fmt).flatten()
    assert torch.equal(result[[0, 2]], alone)


@pytest.mark.parametrize("fmt", INTEGERS)
def test_values_beyond_the_range_saturate_infinities_too(fmt: IntegerFormat) -> None:
    scale, zero_point = scale_from_range(torch.tensor([[-0.5]]), torch.tensor([[1.0]]), fmt)
    codes = quantize(one_group([math.inf, -math.inf, 99.0, -99.0]), scale, zero_point, fmt)
    assert codes.flatten().tolist() == [fmt.qmax, fmt.qmin, fmt.qmax, fmt.qmin]


@pytest.mark.parametrize("fmt", INTEGERS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
def test_a_scale_from_a_range_that_is_not_finite_makes_its_group_nan(
    fmt: IntegerFormat, bad: float
) -> None:
    grouped = torch.tensor([[[1.0, bad, 0.5], [1.0, 0.25, 0.5]]])
    result = max_scaled(grouped, fmt)
    assert result[0, 0].isnan().all()
    assert result[0, 1].isfinite().all()


@pytest.mark.parametrize("fmt", INTEGERS)
def test_the_whole_range_of_float32_has_a_finite_scale(fmt: IntegerFormat) -> None:
    grouped = one_group([LARGEST, -LARGEST, 1.0, 0.0])
    scale, zero_point = max_scale(grouped, fmt)
    assert scale.isfinite().all()
    result = fake_quantize(grouped, scale, zero_point, fmt)
    assert not result.isnan().any()
    assert result.flatten()[2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("fmt", UNSIGNED)
@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([2.0, 5.0], 0.0, 5.0), ([-5.0, -2.0], -5.0, 0.0), ([-1.0, 3.0], -1.0, 3.0)],
    ids=["positive", "negative", "both"],
)
def test_unsigned_codes_are_spread_over_the_range_with_zero(
    fmt: IntegerFormat, values: list[float], low: float, high: float
) -> None:
    scale, zero_point = max_scale(one_group(values), fmt)
    assert scale.item() == pytest.approx((high - low) / fmt.qmax)
    assert zero_point is not None
    assert zero_point.item() == round(-low / scale.item())


@pytest.mark.parametrize("fmt", SIGNED)
def test_signed_scales_are_symmetric_and_have_no_zero_point(fmt: IntegerFormat) -> None:
    scale, zero_point = max_scale(one_group([-6.0, 1.0]), fmt)
    assert scale.item() == torch.tensor(6.0).div(fmt.qmax).item()
    assert zero_point is None


@pytest.mark.parametrize("fmt", INTEGERS)
@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_empty_tensors_stay_empty(fmt: IntegerFormat, shape: tuple[int, int, int]) -> None:
    assert max_scaled(torch.empty(shape), fmt).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", INTEGERS)
def test_arithmetic_is_float32_and_the_result_has_the_dtype_of_the_input(
    fmt: IntegerFormat, dtype: torch.dtype
) -> None:
    grouped = random_groups(4, 3, 2, 16).to(dtype)
    scale, zero_point = max_scale(grouped, fmt)
    assert scale.dtype is torch.float32
    result = fake_quantize(grouped, scale, zero_point, fmt)
    assert result.dtype is dtype
    assert torch.equal(result, max_scaled(grouped.float(), fmt).to(dtype))


@pytest.mark.parametrize("fmt", INTEGERS)
def test_the_gradient_passes_straight_through_and_is_zero_where_saturated(
    fmt: IntegerFormat,
) -> None:
    scale = torch.full((1, 1), 0.5)
    zero_point = None if fmt.signed else torch.full((1, 1), 1.0)
    low, high = (float(dequantize(torch.tensor([[[float(q)]]]), scale, zero_point)) for q in
                 (fmt.qmin, fmt.qmax))  # fmt: skip
    values = one_group([low - 0.5, low, 0.0, high, high + 0.5, math.inf]).requires_grad_()
    result = fake_quantize(values, scale, zero_point, fmt)
    result.backward(torch.tensor([[[7.0, 7.0, -3.0, 7.0, math.inf, math.nan]]]))
    assert values.grad is not None
    assert values.grad.flatten().tolist() == [0.0, 7.0, -3.0, 7.0, 0.0, 0.0]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_the_gradient_is_zero_beyond_half_a_step_outside_the_last_values(
    fmt: NumberFormat,
) -> None:
    scale, zero_point = torch.full((1, 1), 0.25), None if fmt.signed else torch.full((1, 1), 1.0)
    low, high = reach(fmt)
    numbers = [low - 0.01, low + 0.01, fmt.min_value, 0.0, fmt.max_value, high - 0.01, high + 0.01]
    if not fmt.signed:
        numbers = [number - 1 for number in numbers]
    values = (one_group(numbers) / 4).requires_grad_()
    fake_quantize(values, scale, zero_point, fmt).backward(torch.full((1, 1, 7), 3.0))
    assert values.grad is not None
    assert values.grad.flatten().tolist() == [0.0, 3.0, 3.0, 3.0, 3.0, 3.0, 0.0]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_under_a_max_scale_every_gradient_passes(fmt: NumberFormat, dtype: torch.dtype) -> None:
    values = random_groups(7, 8, 4, 16).to(dtype).requires_grad_()
    gradient = random_groups(8, 8, 4, 16).to(dtype)
    fake_quantize(values, *max_scale(values, fmt), fmt).backward(gradient)
    assert values.grad is not None
    assert values.grad.dtype is dtype
    assert torch.equal(values.grad, gradient)


def test_under_a_power_of_two_the_gradient_of_what_saturates_is_zero() -> None:
    values = one_group([7.5, 6.5, -7.5, 1.0]).requires_grad_()
    fmt = format_named("fp4_e2m1")
    scale, _ = max_scale(values, fmt, "e8m0")
    assert scale.item() == 1.0
    fake_quantize(values, scale, None, fmt).sum().backward()
    assert values.grad is not None
    assert values.grad.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]


def test_rounding_itself_has_no_gradient() -> None:
    for fmt in FORMATS.values():
        values = random_groups(9, 1, 1, 8).requires_grad_()
        round_to(values, fmt).add(values).sum().backward()
        assert values.grad is not None
        assert torch.equal(values.grad, torch.ones(1, 1, 8))


def test_the_gradient_agrees_with_torch() -> None:
    ours = random_groups(5, 1, 1, 200).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    weights = random_groups(6, 1, 1, 200)
    scale = torch.full((1, 1), 2.0**-4)
    (fake_quantize(ours, scale, None, IntegerFormat(4, signed=True)) * weights).sum().backward()
    result = torch.fake_quantize_per_tensor_affine(theirs, 2.0**-4, 0, -8, 7)
    (result * weights).sum().backward()
    assert ours.grad is not None
    assert 0 < ours.grad.count_nonzero() < 200
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fmt", "name", "low", "high"),
    [
        (IntegerFormat(2, True), "int2", -2, 1),
        (IntegerFormat(4, True), "int4", -8, 7),
        (IntegerFormat(8, True), "int8", -128, 127),
        (IntegerFormat(4, False), "uint4", 0, 15),
        (IntegerFormat(8, False), "uint8", 0, 255),
    ],
    ids=["int2", "int4", "int8", "uint4", "uint8"],
)
def test_names_and_limits(fmt: IntegerFormat, name: str, low: int, high: int) -> None:
    assert (fmt.name, fmt.qmin, fmt.qmax) == (name, low, high)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_a_width_that_does_not_exist_is_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"2 to 8; received {bits}"):
        integer_format(bits, symmetric=True)


@pytest.mark.parametrize("fmt", INTEGERS)
def test_a_format_is_found_by_its_width_and_sign(fmt: IntegerFormat) -> None:
    assert integer_format(fmt.num_bits, symmetric=fmt.signed) is fmt
