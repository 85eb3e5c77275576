# SPDX-License-Identifier: Apache-2.0
"""Rounding to formats and their codes: against specifications, other libraries, the reference."""

from __future__ import annotations

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.errors import ConfigError
from modewright.formats.catalogue import (
    FLOAT_NAMES,
    FORMATS,
    NumberFormat,
    code_values,
    decode,
    encode,
    format_named,
    reach,
    round_to,
)
from modewright.formats.floating import FLOAT_FORMATS, FP8_E4M3, FP8_E5M2, NF4, FloatFormat
from modewright.formats.integer import ALL_INTEGER_FORMATS, IntegerFormat
from modewright.formats.reference import round_value, value_of_code

ORACLES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
TORCH = {FP8_E4M3: torch.float8_e4m3fn, FP8_E5M2: torch.float8_e5m2}
EDGES = [0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4e38, -3.4e38, math.inf, -math.inf]
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
each_float = pytest.mark.parametrize("fmt", FLOAT_FORMATS, ids=lambda fmt: fmt.name)
float32s = st.floats(width=32, allow_nan=True, allow_infinity=True)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours.isnan(), theirs.isnan())
    number = ~ours.isnan()
    assert torch.equal(ours[number].view(torch.int32), theirs[number].view(torch.int32))


def all_codes(fmt: NumberFormat) -> torch.Tensor:
    return torch.arange(1 << fmt.num_bits, dtype=torch.uint8)


def values_of(fmt: NumberFormat) -> torch.Tensor:
    return decode(all_codes(fmt), fmt)


def telling_values(fmt: NumberFormat) -> torch.Tensor:
    """All values of a format, their middles, the float32 numbers beside both, and edges."""
    values = values_of(fmt)
    values = values[values.isfinite()].sort().values
    places = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor(reach(fmt))])
    up = torch.nextafter(places, torch.full_like(places, math.inf))
    down = torch.nextafter(places, torch.full_like(places, -math.inf))
    return torch.cat([places, up, down, torch.tensor([*EDGES, math.nan])])


def random_values(fmt: NumberFormat, *shape: int) -> torch.Tensor:
    """Normal numbers, of which a few lie beyond the format."""
    generator = torch.Generator().manual_seed(fmt.num_bits)
    return torch.randn(*shape, generator=generator) * fmt.max_value / 2


def oracle(values: torch.Tensor, fmt: FloatFormat) -> np.ndarray:
    return values.numpy().astype(ORACLES[fmt.name])


@each_format
def test_a_format_is_found_by_its_name(fmt: NumberFormat) -> None:
    assert format_named(fmt.name) is fmt


def test_an_unknown_name_is_an_error_that_names_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"'fp8_e4m4'.*fp8_e4m3"):
        format_named("fp8_e4m4")


def test_the_names_of_formats_that_are_no_integers_are_listed() -> None:
    integers = {fmt.name for fmt in ALL_INTEGER_FORMATS}
    assert set(FLOAT_NAMES) == set(FORMATS) - integers


@pytest.mark.parametrize(
    ("name", "bits", "bias", "largest", "smallest_normal", "smallest"),
    [  # OCP 8-bit floating point specification 1.0; OCP microscaling formats specification 1.0
        ("fp8_e4m3", 8, 7, 448.0, 2.0**-6, 2.0**-9),
        ("fp8_e5m2", 8, 15, 57344.0, 2.0**-14, 2.0**-16),
        ("fp6_e3m2", 6, 3, 28.0, 0.25, 0.0625),
        ("fp6_e2m3", 6, 1, 7.5, 1.0, 0.125),
        ("fp4_e2m1", 4, 1, 6.0, 1.0, 0.5),
    ],
)
def test_formats_are_those_of_the_specifications(
    name: str, bits: int, bias: int, largest: float, smallest_normal: float, smallest: float
) -> None:
    fmt = format_named(name)
    assert isinstance(fmt, FloatFormat)
    assert (fmt.num_bits, fmt.bias, fmt.max_value) == (bits, bias, largest)
    assert (fmt.smallest_normal, fmt.smallest) == (smallest_normal, smallest)
    positive = [value for value in code_values(fmt) if 0 < value < math.inf]
    assert (min(positive), max(positive)) == (smallest, largest)


def test_the_values_of_fp4() -> None:
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert code_values(format_named("fp4_e2m1")) == (*half, *(-value for value in half))


def test_special_codes_are_those_of_the_specification() -> None:
    e4m3, e5m2 = code_values(FP8_E4M3), code_values(FP8_E5M2)
    assert [code for code, value in enumerate(e4m3) if math.isnan(value)] == [0x7F, 0xFF]
    assert (e5m2[0x7C], e5m2[0xFC]) == (math.inf, -math.inf)
    assert [code for code, value in enumerate(e5m2) if math.isnan(value)] == [
        *range(0x7D, 0x80),
        *range(0xFD, 0x100),
    ]


def test_nf4_is_the_published_table_of_float32_numbers() -> None:
    values = torch.tensor(NF4.values)
    assert values.double().tolist() == list(NF4.values)
    assert (NF4.values[0], NF4.values[7], NF4.values[15]) == (-1.0, 0.0, 1.0)
    assert all(a < b for a, b in pairwise(NF4.values))


@each_float
def test_all_codes_mean_what_they_mean_to_ml_dtypes(fmt: FloatFormat) -> None:
    theirs = all_codes(fmt).numpy().view(ORACLES[fmt.name]).astype(np.float32)
    assert_same_bits(values_of(fmt), torch.from_numpy(theirs))


@pytest.mark.parametrize("fmt", TORCH, ids=lambda fmt: fmt.name)
def test_all_codes_mean_what_they_mean_to_torch(fmt: FloatFormat) -> None:
    assert_same_bits(values_of(fmt), all_codes(fmt).view(TORCH[fmt]).float())


@each_format
def test_all_codes_mean_what_they_mean_to_the_reference(fmt: NumberFormat) -> None:
    slow = torch.tensor([value_of_code(code, fmt) for code in range(1 << fmt.num_bits)])
    assert_same_bits(values_of(fmt), slow)


@each_format
def test_every_code_survives_decoding_and_encoding(fmt: NumberFormat) -> None:
    codes, values = all_codes(fmt), values_of(fmt)
    back = encode(values, fmt)
    assert back.dtype is torch.uint8
    assert torch.equal(back[~values.isnan()], codes[~values.isnan()])
    assert (back[values.isnan()] == 0x7F).all()


@each_format
def test_nan_and_infinity_have_the_codes_that_are_documented(fmt: NumberFormat) -> None:
    codes = encode(torch.tensor([math.nan, math.inf, -math.inf]), fmt)
    nan, infinity, negative = decode(codes, fmt).tolist()
    if getattr(fmt, "has_nan", False):
        assert math.isnan(nan)
    else:
        assert codes[0] == 0
    largest = math.inf if getattr(fmt, "has_infinity", False) else fmt.max_value
    smallest = -math.inf if getattr(fmt, "has_infinity", False) else fmt.min_value
    assert (infinity, negative) == (largest, smallest)


@each_format
def test_rounding_equals_the_reference_at_every_value_and_every_middle(fmt: NumberFormat) -> None:
    values = telling_values(fmt)
    slow = torch.tensor([round_value(value, fmt) for value in values.tolist()])
    assert_same_bits(round_to(values, fmt), slow)


@given(values=st.lists(float32s, max_size=8), fmt=st.sampled_from(list(FORMATS.values())))
def test_rounding_equals_the_reference_anywhere(values: list[float], fmt: NumberFormat) -> None:
    slow = torch.tensor([round_value(value, fmt) for value in values])
    assert_same_bits(round_to(torch.tensor(values), fmt), slow)


@each_format
def test_rounding_equals_the_reference_where_the_format_has_its_values(fmt: NumberFormat) -> None:
    values = random_values(fmt, 500)
    slow = torch.tensor([round_value(value, fmt) for value in values.tolist()])
    assert_same_bits(round_to(values, fmt), slow)


@each_float
def test_rounding_and_codes_agree_with_ml_dtypes(fmt: FloatFormat) -> None:
    values = torch.cat([telling_values(fmt), random_values(fmt, 20_000)])
    values = values[values.abs() <= fmt.max_value]  # there, beyond the largest value may be NaN
    theirs = oracle(values, fmt)
    rounded = round_to(values, fmt)
    assert_same_bits(rounded, torch.from_numpy(theirs.astype(np.float32)))
    assert torch.equal(encode(rounded, fmt), torch.from_numpy(theirs.view(np.uint8)))


@pytest.mark.parametrize("fmt", TORCH, ids=lambda fmt: fmt.name)
def test_rounding_and_codes_agree_with_torch_which_need_not_saturate(fmt: FloatFormat) -> None:
    values = torch.cat([telling_values(fmt), random_values(fmt, 20_000)])
    theirs = values.clamp(-fmt.max_value, fmt.max_value).to(TORCH[fmt])
    assert_same_bits(round_to(values, fmt), theirs.float())
    number = ~values.isnan()
    assert torch.equal(encode(theirs.float(), fmt)[number], theirs.view(torch.uint8)[number])


@each_format
def test_what_lies_beyond_saturates_and_nan_stays_nan(fmt: NumberFormat) -> None:
    rounded = round_to(torch.tensor([math.inf, -math.inf, 3e38, -3e38, math.nan]), fmt)
    assert rounded[:4].tolist() == [fmt.max_value, fmt.min_value] * 2
    assert rounded[4].isnan()


@each_format
def test_only_floating_point_numbers_have_a_zero_with_a_sign(fmt: NumberFormat) -> None:
    rounded = round_to(torch.tensor([-0.0, -1e-40, 0.0, 1e-40]), fmt)
    assert rounded.tolist() == [0.0] * 4
    signed = isinstance(fmt, FloatFormat)
    assert torch.signbit(rounded).tolist() == [signed, signed, False, False]


@each_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_dtype_is_rounded_as_float32(fmt: NumberFormat, dtype: torch.dtype) -> None:
    values = torch.linspace(-10, 10, 101).to(dtype)
    rounded = round_to(values, fmt)
    assert_same_bits(rounded, round_to(values.float(), fmt))
    assert torch.equal(encode(rounded.to(torch.float64), fmt), encode(rounded, fmt))


@each_format
def test_shape_and_strides_do_not_matter(fmt: NumberFormat) -> None:
    values = random_values(fmt, 6, 5)
    whole = round_to(values, fmt)
    for view in (values.t(), values[::2], values[:, 1:4], values[3, 2], values[:0], values[:, :1]):
        codes = encode(round_to(view, fmt), fmt)
        assert codes.shape == view.shape
        assert_same_bits(decode(codes, fmt), round_to(view.contiguous(), fmt))
    assert_same_bits(round_to(values.t(), fmt).t(), whole)
    assert_same_bits(round_to(values[0].expand(3, 5), fmt)[2], whole[0])


@each_format
def test_rounding_does_not_touch_what_it_is_given(fmt: NumberFormat) -> None:
    values = random_values(fmt, 7)
    before = values.clone()
    codes = encode(round_to(values, fmt), fmt)
    encode(values, fmt)
    decode(codes, fmt).mul_(2)
    assert torch.equal(values, before)
    assert_same_bits(decode(codes, fmt), round_to(values, fmt))


@each_format
def test_the_reach_ends_half_a_step_beyond_the_last_values(fmt: NumberFormat) -> None:
    low, high = reach(fmt)
    if isinstance(fmt, IntegerFormat):
        assert (low, high) == (fmt.qmin - 0.5, fmt.qmax + 0.5)
    elif isinstance(fmt, FloatFormat):
        step = 2.0 ** (math.floor(math.log2(fmt.max_value)) - fmt.mantissa_bits)
        assert (-low, high) == (fmt.max_value + step / 2,) * 2
    else:
        assert high == pytest.approx(1.13852, abs=1e-5)
        assert low == pytest.approx(-1.15190, abs=1e-5)
