# SPDX-License-Identifier: Apache-2.0
"""Scales and the formats they are stored in: against specifications, ml_dtypes, the reference."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.errors import ConfigError
from modewright.formats import reference
from modewright.formats.affine import fake_quantize
from modewright.formats.catalogue import FORMATS, NumberFormat, format_named
from modewright.formats.floating import FP4_E2M1, FP8_E4M3, NF4
from modewright.formats.grouping import Grouping
from modewright.formats.integer import integer_format
from modewright.formats.scaling import (
    ScaleFormat,
    four_over_six,
    global_scale_for,
    global_scale_of,
    power_of_less_error,
    round_scale,
    scale_for,
    scale_from_range,
)
from modewright.quantization.algorithms.max import max_scale

LARGEST = torch.finfo(torch.float32).max
TINY = 2.0**-126
INT8 = integer_format(8, symmetric=True)
MX = {  # elements, their largest exponent, and what ml_dtypes calls them
    "fp8_e4m3": (8, ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": (15, ml_dtypes.float8_e5m2),
    "fp6_e3m2": (4, ml_dtypes.float6_e3m2fn),
    "fp6_e2m3": (2, ml_dtypes.float6_e2m3fn),
    "fp4_e2m1": (2, ml_dtypes.float4_e2m1fn),
}
GROUPINGS = {
    "tensor": Grouping("tensor"),
    "channel": Grouping("channel"),
    "last axis": Grouping("channel", channel_axis=-1),
    "group": Grouping("group", 4),
    "group of the second axis": Grouping("group", 4, channel_axis=1),
    "group of tokens": Grouping("group", 3, channel_axis=None),
    "block": Grouping("block", block_size=(2, 4)),
    "block of the second axis": Grouping("block", channel_axis=1, block_size=(3, 2)),
    "block of tokens": Grouping("block", channel_axis=None, block_size=(4, 4)),
    "token": Grouping("token"),
}
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
SIGNED = [fmt for fmt in FORMATS.values() if fmt.signed]
each_signed = pytest.mark.parametrize("fmt", SIGNED, ids=lambda fmt: fmt.name)
each_scale_format = pytest.mark.parametrize("scale_format", ["fp32", "e8m0", "e4m3"])
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=2.0**-149, max_value=LARGEST, width=32)


def random_values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scale_of(
    amax: float, fmt: NumberFormat, scale_format: ScaleFormat, level: torch.Tensor | None = None
) -> float:
    low, high = torch.tensor([-0.0]), torch.tensor([amax])
    return scale_from_range(low, high, fmt, scale_format, level)[0].item()


def level_of(values: torch.Tensor, fmt: NumberFormat, scale_format: str) -> torch.Tensor | None:
    return global_scale_of(values.abs().amax(), fmt) if scale_format == "e4m3" else None


def assert_equals_reference(
    values: torch.Tensor, grouping: Grouping, fmt: NumberFormat, scale_format: ScaleFormat
) -> None:
    grouped = grouping.split(values)
    scales = max_scale(grouped, fmt, scale_format, level_of(values, fmt, scale_format))
    fast = grouping.join(fake_quantize(grouped, *scales, fmt), values.shape)
    slow = reference.fake_quantize_tensor(
        values.flatten().tolist(), values.shape, grouping, fmt, scale_format
    )
    slow = torch.tensor(slow).reshape(values.shape)
    assert torch.equal(fast.isnan(), slow.isnan())
    number = ~slow.isnan()
    assert torch.equal(fast[number].view(torch.int32), slow[number].view(torch.int32))


# All of it together, against the reference


@each_format
@each_scale_format
def test_every_format_scale_and_granularity_equals_the_reference(
    fmt: NumberFormat, scale_format: ScaleFormat
) -> None:
    values = random_values(fmt.num_bits, 3, 5, 7) * torch.logspace(-20, 20, 7)
    values[:, 2, 4] = 0
    values[1] = 0
    for grouping in GROUPINGS.values():
        assert_equals_reference(values, grouping, fmt, scale_format)


@given(
    values=st.lists(float32s, min_size=1, max_size=12),
    fmt=st.sampled_from(list(FORMATS.values())),
    scale_format=st.sampled_from(["fp32", "e8m0", "e4m3"]),
    grouping=st.sampled_from(list(GROUPINGS.values())),
)
def test_any_finite_values_equal_the_reference(
    values: list[float], fmt: NumberFormat, scale_format: ScaleFormat, grouping: Grouping
) -> None:
    tensor = torch.tensor(values).reshape(-1, 2 - len(values) % 2)
    assert_equals_reference(tensor, grouping, fmt, scale_format)


@each_format
@each_scale_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_range_that_is_not_finite_makes_its_group_nan_and_no_other(
    fmt: NumberFormat, scale_format: ScaleFormat, bad: float
) -> None:
    grouped = torch.tensor([[[1.0, bad, 0.5], [1.0, 0.25, 0.5]]])
    scales = max_scale(grouped, fmt, scale_format, torch.tensor(2.0**-8))
    result = fake_quantize(grouped, *scales, fmt)
    assert result[0, 0].isnan().all()
    assert result[0, 1].isfinite().all()


@each_format
@each_scale_format
def test_scales_are_numbers_that_one_can_divide_by(
    fmt: NumberFormat, scale_format: ScaleFormat
) -> None:
    for amax in (0.0, 2.0**-149, TINY, 1e-30, 1.0, 1e30, LARGEST):
        grouped = torch.tensor([[[amax, 0.0, amax / 3]]])
        level = level_of(grouped, fmt, scale_format)
        scale, zero_point = max_scale(grouped, fmt, scale_format, level)
        assert TINY <= scale.item() < math.inf
        result = fake_quantize(grouped, scale, zero_point, fmt).flatten()
        assert not result.isnan().any()
        assert result[1] == 0


# Powers of two


@pytest.mark.parametrize(
    ("name", "amax", "expected"),
    [
        ("fp4_e2m1", 6.0, 1.0),  # all numbers of the format as they are
        ("fp4_e2m1", 4.0, 1.0),
        ("fp4_e2m1", 7.99, 1.0),  # saturates at 6
        ("fp4_e2m1", 8.0, 2.0),
        ("fp4_e2m1", 3.99, 0.5),
        ("fp6_e2m3", 7.5, 1.0),
        ("fp6_e3m2", 28.0, 1.0),
        ("fp6_e3m2", 32.0, 2.0),
        ("fp8_e4m3", 448.0, 1.0),
        ("fp8_e4m3", 512.0, 2.0),
        ("fp8_e5m2", 57344.0, 1.0),
        ("fp8_e5m2", 1.0, 2.0**-15),
        ("int8", 1.0, 2.0**-6),  # MXINT8 counts in 1/64
        ("int8", 1.999, 2.0**-6),
        ("int8", 127 / 64, 2.0**-6),
        ("nf4", 1.5, 1.0),
    ],
)
def test_known_powers_of_two(name: str, amax: float, expected: float) -> None:
    assert scale_of(amax, format_named(name), "e8m0") == expected


@pytest.mark.parametrize("name", MX)
def test_the_shared_exponent_is_that_of_the_specification(name: str) -> None:
    largest_exponent = MX[name][0]
    for exponent in range(-126, 128):
        for fraction in (1.0, 1.0 + 2.0**-23, 1.5, 2.0 - 2.0**-23):
            expected = 2.0 ** max(exponent - largest_exponent, -126)
            assert scale_of(fraction * 2.0**exponent, format_named(name), "e8m0") == expected


@each_signed
def test_powers_of_two_are_numbers_of_the_format(fmt: NumberFormat) -> None:
    amax = torch.cat([torch.logspace(-45, 38.5, 500), torch.tensor([0.0, LARGEST, 2.0**-149])])
    scale, _ = scale_from_range(-amax, amax, fmt, "e8m0")
    stored = scale.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(stored, scale.numpy())


@pytest.mark.parametrize("name", MX)
@given(values=st.lists(float32s, min_size=1, max_size=32))
def test_a_microscaled_group_is_what_ml_dtypes_makes_of_it(name: str, values: list[float]) -> None:
    largest_exponent, element = MX[name]
    fmt = format_named(name)
    group = np.array(values, dtype=np.float32)
    amax = np.abs(group).max()
    exponent = 0 if amax == 0 else math.frexp(amax)[1] - 1 - largest_exponent
    shared = np.float32(2.0 ** max(exponent, -126)) if amax else np.float32(1)
    inside = np.clip(group / shared, fmt.min_value, fmt.max_value)  # it may not saturate itself
    theirs = torch.from_numpy(inside.astype(element).astype(np.float32) * shared)
    grouped = torch.from_numpy(group).reshape(1, 1, -1)
    ours = fake_quantize(grouped, *max_scale(grouped, fmt, "e8m0"), fmt).flatten()
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@given(scale=positive)
def test_the_nearest_power_of_two_is_nearest_in_the_logarithm(scale: float) -> None:
    power = round_scale(torch.tensor([scale]), "e8m0").item()
    assert math.frexp(power)[0] == 0.5
    if TINY <= scale <= 2.0**127:
        assert abs(math.log2(scale) - math.log2(power)) <= 0.5 + 1e-7


# Numbers of fp8 times one float32


def test_a_two_level_group_is_what_ml_dtypes_makes_of_it() -> None:
    values = random_values(1, 6, 8, 16) * torch.logspace(-4, 1, 6).reshape(-1, 1, 1)
    groups = values.numpy()
    level = np.abs(groups).max() / np.float32(6 * 448)
    amax = np.abs(groups).max(axis=-1, keepdims=True)
    fp8 = (amax / np.float32(6) / level).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = np.maximum(fp8, 2.0**-9) * level
    inside = np.clip(groups / scale, -6, 6)
    theirs = inside.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    ours = global_scale_of(values.abs().amax(), FP4_E2M1)
    assert ours.item() == level
    scales = max_scale(values, FP4_E2M1, "e4m3", ours)
    assert torch.equal(scales[0], torch.from_numpy(scale).squeeze(-1))
    assert torch.equal(fake_quantize(values, *scales, FP4_E2M1), torch.from_numpy(theirs))


@each_signed
@pytest.mark.parametrize("largest", [448.0, 256.0])
def test_the_largest_group_gets_the_largest_scale(fmt: NumberFormat, largest: float) -> None:
    grouped = random_values(2, 3, 4, 16)
    level = global_scale_of(grouped.abs().amax(), fmt, largest)
    scale, _ = max_scale(grouped, fmt, "e4m3", level)
    assert scale.max() == level * largest


@given(amax=st.floats(0, LARGEST, width=32))
def test_two_level_scales_are_stored_as_fp8(amax: float) -> None:
    level = global_scale_of(torch.tensor(amax), FP4_E2M1)
    wanted = torch.tensor([0.0, 1e-9, 0.003, 0.1, 0.5, 1.0, 2.0]) * level * 448
    scale = round_scale(wanted, "e4m3", level)
    stored = reference.round_value
    assert [stored(s, FP8_E4M3) for s in (scale / level).tolist()] == [
        min(max(stored(w, FP8_E4M3), 2.0**-9), 448.0) for w in (wanted / level).tolist()
    ]


@pytest.mark.parametrize(
    ("amax", "expected"),
    [
        (0.0, 1.0),
        (2688 * 2.0**-118, 1.0),
        (2688 * 2.0**-117, 2.0**-117),  # the smallest of its group scales is 2**-126
        (2688.0, 1.0),
        (5376.0, 2.0),
    ],
)
def test_the_scale_of_a_tensor_of_next_to_nothing_is_one(amax: float, expected: float) -> None:
    assert global_scale_of(torch.tensor(amax), FP4_E2M1).item() == expected


@pytest.mark.parametrize(
    ("scale_format", "scales", "expected"),
    [
        ("fp32", [0.0, 2.0**-149, 2.0**-127, TINY, 0.3], [1.0, 1.0, 1.0, TINY, 0.3]),
        ("e8m0", [0.0, 2.0**-149, 2.0**-127, TINY, LARGEST], [1.0, TINY, TINY, TINY, 2.0**127]),
        ("e8m0", [1.4142135, 1.4142137, 0.75, 3.0], [1.0, 2.0, 1.0, 4.0]),
        ("e4m3", [0.0, 2.0**-12, 0.3, LARGEST], [2.0**-10, 2.0**-10, 0.3125, 224.0]),
    ],
)
def test_scales_that_a_format_does_not_have(
    scale_format: ScaleFormat, scales: list[float], expected: list[float]
) -> None:
    rounded = round_scale(torch.tensor(scales), scale_format, torch.tensor(0.5))
    assert torch.equal(rounded, torch.tensor(expected))
    for bad in (math.nan, math.inf):
        rounded = round_scale(torch.tensor([bad, 1.0]), scale_format, torch.tensor(0.5))
        assert not rounded[0].isfinite()
        assert rounded[1] == 1.0


@each_signed
def test_a_group_of_zeros_has_the_power_of_two_that_is_one(fmt: NumberFormat) -> None:
    assert scale_of(0.0, fmt, "e8m0") == 1.0


def test_without_a_scale_of_the_tensor_group_scales_are_plain_fp8() -> None:
    scale = round_scale(torch.tensor([0.0, 0.3, 1000.0]), "e4m3")
    assert scale.tolist() == [2.0**-9, 0.3125, 448.0]


# Four or six


def squared_error(grouped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (fake_quantize(grouped, scale, None, FP4_E2M1) - grouped).double().square().sum(dim=-1)


@pytest.mark.parametrize("largest", [256.0, 448.0])
@given(values=st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=32))
def test_four_over_six_never_has_a_larger_squared_error(
    largest: float, values: list[float]
) -> None:
    grouped = torch.tensor(values)[: len(values) // 4 * 4].reshape(1, -1, 4)
    level = global_scale_of(grouped.abs().amax(), FP4_E2M1, largest)
    six, _ = max_scale(grouped, FP4_E2M1, "e4m3", level)
    error = squared_error(grouped, four_over_six(grouped, level))
    assert (error <= squared_error(grouped, six) * (1 + 1e-6)).all()


def test_four_over_six_has_a_smaller_error_on_normal_weights() -> None:
    grouped = random_values(3, 64, 16, 16)
    level = global_scale_of(grouped.abs().amax(), FP4_E2M1, 256)
    six, _ = max_scale(grouped, FP4_E2M1, "e4m3", level)
    chosen = four_over_six(grouped, level)
    assert squared_error(grouped, chosen).sum() < 0.95 * squared_error(grouped, six).sum()
    fours = chosen != six
    assert 0.2 < fours.float().mean() < 0.8
    assert torch.equal(chosen[fours], round_scale(grouped.abs().amax(-1) / 4, "e4m3", level)[fours])


def test_a_group_that_four_suits_gets_four_and_one_that_six_suits_gets_six() -> None:
    fives = torch.tensor([6.0, 4.5, 3.0, 1.5])  # under 3/2: 4, 3, 2, 1
    sixes = torch.tensor([6.0, 4.0, 3.0, 0.5])
    scale = four_over_six(torch.stack([fives, sixes]).unsqueeze(0), torch.tensor(1.0))
    assert scale.tolist() == [[1.5, 1.0]]


def test_four_over_six_at_the_edges() -> None:
    level = torch.tensor(2.0**-8)
    for shape in ((2, 0, 16), (2, 3, 0), (0, 3, 16)):
        assert four_over_six(torch.empty(shape), level).shape == shape[:2]
    assert four_over_six(torch.zeros(1, 1, 16), level).item() == 2.0**-17
    assert not four_over_six(torch.tensor([[[1.0, math.nan]]]), level).isfinite()
    half = random_values(4, 2, 3, 16).half()
    assert torch.equal(four_over_six(half, level), four_over_six(half.float(), level))


# Plain scales


@each_signed
def test_a_max_scale_brings_the_largest_magnitude_to_the_largest_value(fmt: NumberFormat) -> None:
    assert scale_of(fmt.max_value * 0.75, fmt, "fp32") == 0.75


@each_signed
def test_scales_of_half_precision_are_computed_in_float32(fmt: NumberFormat) -> None:
    for scale_format in ("fp32", "e8m0", "e4m3"):
        low, high = torch.tensor([-3.3]).half(), torch.tensor([1.0]).half()
        scale, _ = scale_from_range(low, high, fmt, scale_format)
        expected, _ = scale_from_range(low.float(), high.float(), fmt, scale_format)
        assert scale.dtype is torch.float32
        assert torch.equal(scale, expected)
        assert round_scale(high, scale_format).dtype is torch.float32


def test_only_integers_have_a_zero_point() -> None:
    unsigned = type(NF4)("unf4", NF4.values, signed=False)
    with pytest.raises(ConfigError, match="unf4 has no zero point"):
        scale_from_range(torch.zeros(1), torch.ones(1), unsigned)


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e2m3", "fp8_e4m3", "int8"])
def test_the_power_of_less_error_never_loses_to_that_of_the_specification(name: str) -> None:
    fmt = format_named(name)
    grouped = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(3))
    grouped[:, :, 0] *= 3
    chosen = power_of_less_error(grouped, fmt)
    specified, _ = max_scale(grouped, fmt, "e8m0")

    def error_of(scale: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(grouped, scale, None, fmt) - grouped).square().sum(-1)

    assert (error_of(chosen) <= error_of(specified)).all()
    assert set((chosen / specified).unique().tolist()) <= {1.0, 2.0}
    if fmt is FP4_E2M1:
        assert error_of(chosen).sum() < 0.95 * error_of(specified).sum()


def test_where_the_largest_value_saturates_twice_the_power_is_taken() -> None:
    grouped = torch.tensor([[[7.9, 1.0]], [[4.0, 0.5]]])

    assert power_of_less_error(grouped, FP4_E2M1).flatten().tolist() == [2.0, 1.0]
    assert power_of_less_error(grouped[:, :, :0], FP4_E2M1).shape == (2, 1)
    assert not power_of_less_error(torch.full((1, 1, 2), math.nan), FP4_E2M1).isfinite()


@pytest.mark.parametrize("scale_format", ["fp32", "e8m0", "e4m3"])
def test_a_rule_says_how_scales_follow_from_values(scale_format: ScaleFormat) -> None:
    grouped = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(4))
    by_max = global_scale_for(grouped, FP4_E2M1, scale_format, "max")
    by_error = global_scale_for(grouped, FP4_E2M1, scale_format, "least_error")
    plain, _ = scale_for(grouped, FP4_E2M1, scale_format, by_max, "max")
    better, _ = scale_for(grouped, FP4_E2M1, scale_format, by_error, "least_error")

    assert torch.equal(plain, max_scale(grouped, FP4_E2M1, scale_format, by_max)[0])
    if scale_format == "fp32":
        assert torch.equal(better, plain)
    else:
        assert squared_error(grouped, better).sum() < squared_error(grouped, plain).sum()
