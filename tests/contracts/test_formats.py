# SPDX-License-Identifier: Apache-2.0
"""What holds for every format of the catalogue, and for every tensor of every scheme."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.formats.affine import dequantize, fake_quantize, quantize
from modewright.formats.catalogue import FORMATS, NumberFormat, decode, encode, round_to
from modewright.formats.floating import TableFormat
from modewright.formats.integer import IntegerFormat
from modewright.formats.packing import pack, packed_size, unpack
from modewright.formats.scaling import (
    ScaleFormat,
    four_over_six,
    global_scale_of,
    round_scale,
)
from modewright.quantization.algorithms.max import max_scale
from modewright.quantization.quantizer import Quantizer
from modewright.quantization.representation import MEMBERS, QuantizerConfig
from modewright.quantization.schemes import SCHEMES

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
each_scale_format = pytest.mark.parametrize("scale_format", ["fp32", "e8m0", "e4m3"])
formats = st.sampled_from(list(FORMATS.values()))
float32s = st.floats(width=32, allow_nan=False)
MEMBERS_OF_SCHEMES = [
    pytest.param(config, member != "weights", id=f"{name}-{member}")
    for name, scheme in SCHEMES.items()
    for member in MEMBERS
    if (config := getattr(scheme, member)) is not None
]
SHAPES = [(4, 32), (3, 130), (5,), (2, 3, 200), (1, 1), (0, 8), (8, 0), (2, 0, 4), (129, 129)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def random_groups(fmt: NumberFormat) -> torch.Tensor:
    generator = torch.Generator().manual_seed(fmt.num_bits)
    grouped = torch.randn(5, 3, 16, generator=generator) * torch.logspace(-3, 3, 5).view(5, 1, 1)
    grouped[1, 1] = 0
    grouped[2, 2, :4] = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    return grouped


@each_format
@each_scale_format
def test_packed_codes_stand_for_what_fake_quantization_returns(
    fmt: NumberFormat, scale_format: ScaleFormat
) -> None:
    grouped = random_groups(fmt)
    level = global_scale_of(grouped.abs().amax(), fmt)
    scale, zero_point = max_scale(grouped, fmt, scale_format, level)
    packed = pack(encode(quantize(grouped, scale, zero_point, fmt), fmt), fmt.num_bits)
    assert packed.shape[-1] == packed_size(16, fmt.num_bits) == 2 * fmt.num_bits
    values = decode(unpack(packed, fmt.num_bits, 16), fmt)
    expected = fake_quantize(grouped, scale, zero_point, fmt)
    assert torch.equal(bits(dequantize(values, scale, zero_point)), bits(expected))


@given(values=st.lists(float32s, max_size=16), fmt=formats)
def test_rounding_again_changes_nothing(values: list[float], fmt: NumberFormat) -> None:
    once = round_to(torch.tensor(values), fmt)
    assert torch.equal(bits(round_to(once, fmt)), bits(once))


@each_format
@each_scale_format
def test_fake_quantizing_again_with_the_same_scale_changes_nothing(
    fmt: NumberFormat, scale_format: ScaleFormat
) -> None:
    grouped = random_groups(fmt)
    level = global_scale_of(grouped.abs().amax(), fmt)
    scale, zero_point = max_scale(grouped, fmt, scale_format, level)
    once = fake_quantize(grouped, scale, zero_point, fmt)
    assert torch.equal(fake_quantize(once, scale, zero_point, fmt), once)


@given(values=st.lists(float32s, max_size=16), fmt=formats)
def test_rounding_keeps_the_order_of_values(values: list[float], fmt: NumberFormat) -> None:
    rounded = round_to(torch.tensor(sorted(values)), fmt)
    assert (rounded.diff() >= 0).all()


@given(values=st.lists(float32s, max_size=16), fmt=formats)
def test_nothing_lies_beyond_the_last_values(values: list[float], fmt: NumberFormat) -> None:
    rounded = round_to(torch.tensor(values), fmt)
    assert ((rounded >= fmt.min_value) & (rounded <= fmt.max_value)).all()


@each_format
def test_both_last_values_are_reached(fmt: NumberFormat) -> None:
    ends = round_to(torch.tensor([-1e30, 1e30]), fmt)
    assert ends.tolist() == [fmt.min_value, fmt.max_value]
    assert decode(encode(ends, fmt), fmt).tolist() == ends.tolist()


@given(values=st.lists(float32s, max_size=16), fmt=formats)
def test_the_negative_of_a_value_rounds_to_the_negative(
    values: list[float], fmt: NumberFormat
) -> None:
    if isinstance(fmt, TableFormat) or not fmt.signed:
        return  # neither is symmetric
    inside = torch.tensor(values).clamp(-fmt.max_value, fmt.max_value)
    assert torch.equal(round_to(-inside, fmt), -round_to(inside, fmt))
    if not isinstance(fmt, IntegerFormat):  # which reach one further below zero
        assert fmt.min_value == -fmt.max_value


@each_format
def test_every_format_has_room_for_zero(fmt: NumberFormat) -> None:
    assert round_to(torch.zeros(1), fmt).item() == 0
    assert fmt.min_value <= 0 < fmt.max_value
    assert fmt.num_bits <= 8


@each_scale_format
@given(scales=st.lists(st.floats(0, 2.0**100, width=32), max_size=8))
def test_rounding_a_scale_again_changes_nothing(
    scale_format: ScaleFormat, scales: list[float]
) -> None:
    once = round_scale(torch.tensor(scales), scale_format, torch.tensor(0.25))
    assert torch.equal(round_scale(once, scale_format, torch.tensor(0.25)), once)


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def _another_default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@each_format
@pytest.mark.usefixtures("_another_default_dtype")
def test_arithmetic_is_float32_whatever_the_default_dtype(fmt: NumberFormat) -> None:
    values = torch.tensor([[[0.3, -0.7, 1.0]]], dtype=torch.float32)
    rounded = round_to(values, fmt)
    assert rounded.dtype is torch.float32
    assert torch.equal(decode(encode(rounded, fmt), fmt), rounded)
    for scale_format in ("fp32", "e8m0", "e4m3"):
        level = global_scale_of(values.amax(), fmt)
        scale, zero_point = max_scale(values, fmt, scale_format, level)  # type: ignore[arg-type]
        assert scale.dtype is torch.float32
        assert fake_quantize(values, scale, zero_point, fmt).dtype is torch.float32
    assert four_over_six(values[:, :0], level).dtype is torch.float32


@pytest.mark.parametrize(("config", "holds_tokens"), MEMBERS_OF_SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_of_every_scheme_can_be_quantized(
    config: QuantizerConfig, holds_tokens: bool, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(len(shape))
        tensor = torch.randn(shape, generator=generator).to(dtype)
        quantizer = Quantizer(config, channel_axis=None if holds_tokens else 0)
        result = quantizer(tensor)
        assert (result.shape, result.dtype) == (tensor.shape, tensor.dtype)
        assert result.isfinite().all()
        if tensor.numel():
            error = (result - tensor).float().norm() / tensor.float().norm()
            assert error < {2: 0.9, 3: 0.3, 4: 0.2, 6: 0.1, 8: 0.1}[config.num_bits], shape


@pytest.mark.parametrize(("config", "holds_tokens"), MEMBERS_OF_SCHEMES)
def test_set_scales_and_chosen_codes_give_what_scales_as_they_come_give(
    config: QuantizerConfig, holds_tokens: bool
) -> None:
    if config.dynamic:
        return  # has no scales to set
    for shape in SHAPES:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        quantizer = Quantizer(config, channel_axis=None if holds_tokens else 0)
        expected = quantizer(tensor)
        quantizer.set_from_tensor(tensor)
        assert quantizer.scale is not None
        assert tuple(quantizer.scale.shape) == quantizer.grouping.scale_shape(tensor.shape)
        assert torch.equal(quantizer(tensor), expected)
        scale = quantizer.effective_scale
        assert scale is not None
        grouped = quantizer.grouping.split(tensor)
        numbers = quantize(grouped, scale, quantizer.zero_point, quantizer.format)
        quantizer.choose(quantizer.grouping.join(numbers, tensor.shape))
        assert torch.equal(quantizer(tensor), expected)
