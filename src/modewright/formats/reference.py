# SPDX-License-Identifier: Apache-2.0
"""The same arithmetic one number at a time, in the order one would explain it.

Slow on purpose: it is what the fast path is checked against, bit for bit. Values are Python floats
rounded to float32 after every operation, as the fast path's are; what is nearest is decided in
exact fractions. Of the fast path it uses nothing but the records that describe formats. It begins
with what a code means:

1. :func:`value_of_code`, :func:`round_value`: what a format has, and the nearest of it;
2. :func:`scale_of_group`, :func:`global_scale`: from ranges to scales;
3. :func:`fake_quantize_group`: what remains of values that share a scale;
4. :func:`group_of`, :func:`fake_quantize_tensor`: which values these are;
5. :func:`pack_codes`, :func:`unpack_codes`: codes as bytes.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import product

from modewright.formats.catalogue import NumberFormat
from modewright.formats.floating import FP8_E4M3, FloatFormat, TableFormat
from modewright.formats.grouping import Grouping
from modewright.formats.integer import IntegerFormat
from modewright.formats.scaling import ScaleFormat


def float32(value: float) -> float:
    """Round a Python float to the nearest float32, which may be an infinity."""
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def value_of_code(code: int, fmt: NumberFormat) -> float:
    """Return what one code stands for."""
    if isinstance(fmt, TableFormat):
        return fmt.values[code]
    bits = f"{code:0{fmt.num_bits}b}"
    if isinstance(fmt, IntegerFormat):
        return float(int(bits, 2) - (int(bits[0]) << fmt.num_bits if fmt.signed else 0))
    sign, exponent, mantissa = bits[0], bits[1 : -fmt.mantissa_bits], bits[-fmt.mantissa_bits :]
    if fmt.has_infinity and "0" not in exponent:
        value = math.nan if "1" in mantissa else math.inf
    elif fmt.has_nan and "0" not in exponent + mantissa:
        value = math.nan
    elif "1" in exponent:
        value = int("1" + mantissa, 2) * 2.0 ** (int(exponent, 2) - fmt.bias - fmt.mantissa_bits)
    else:
        value = int(mantissa, 2) * 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)
    return -value if sign == "1" else value


def round_value(value: float, fmt: NumberFormat) -> float:
    """Return the nearest value of a format; NaN is NaN."""
    if math.isnan(value):
        return value
    inside = min(max(value, fmt.min_value), fmt.max_value)
    ordered = _values_in_order(fmt)
    place = bisect_left(ordered, (inside,))
    neighbours = ordered[max(place - 1, 0) : place + 1]
    _, nearest = min((_distance(inside, near, code, fmt), near) for near, code in neighbours)
    return math.copysign(nearest, value) if isinstance(fmt, FloatFormat) else nearest


def _distance(value: float, near: float, code: int, fmt: NumberFormat) -> tuple[Fraction, int]:
    """Return what makes one value nearer than another; with ties, the even or the lower code."""
    tie = code if isinstance(fmt, TableFormat) else code % 2
    return abs(Fraction(value) - Fraction(near)), tie


@cache
def _values_in_order(fmt: NumberFormat) -> list[tuple[float, int]]:
    found = [(value_of_code(code, fmt), code) for code in range(1 << fmt.num_bits)]
    return sorted((value, code) for value, code in found if math.isfinite(value))


def scale_of_group(
    values: Sequence[float],
    fmt: NumberFormat,
    scale_format: ScaleFormat = "fp32",
    level: float = 1.0,
) -> tuple[float, int]:
    """Return the effective scale and the zero point of values that share them.

    Args:
        values: The values of one group.
        fmt: The format of the codes.
        scale_format: What the scale is rounded to.
        level: The scale of the whole tensor; only for ``"e4m3"``.
    """
    if not all(map(math.isfinite, values)):
        return math.nan, 0
    low, high = min([0.0, *values]), max([0.0, *values])
    if not fmt.signed:
        steps = (1 << fmt.num_bits) - 1
        scale = _stored(float32(float32(high / steps) - float32(low / steps)), scale_format, level)
        return scale, min(max(round(float32(-float32(low / scale))), 0), steps)
    amax = max(-low, high)
    if scale_format == "e8m0":
        if amax == 0:
            return 1.0, 0
        last = fmt.num_bits - 2 if isinstance(fmt, IntegerFormat) else _exponent(fmt.max_value)
        return 2.0 ** min(max(_exponent(amax) - last, -126), 127), 0
    return _stored(float32(amax / fmt.max_value), scale_format, level), 0


def global_scale(values: Sequence[float], fmt: NumberFormat) -> float:
    """Return the scale of a whole tensor for the scale format ``"e4m3"``."""
    level = float32(max([0.0, *map(abs, values)]) / (fmt.max_value * FP8_E4M3.max_value))
    return 1.0 if level < 2.0**-117 else level


def _stored(scale: float, scale_format: ScaleFormat, level: float) -> float:
    """Return the effective scale nearest to one that is wanted."""
    if scale_format == "e4m3":
        return float32(max(round_value(float32(scale / level), FP8_E4M3), 2.0**-9) * level)
    if scale == 0:
        return 1.0
    if scale_format == "e8m0":
        exponent = _exponent(scale)
        exponent += Fraction(scale) ** 2 > 2 * Fraction(2) ** (2 * exponent)  # nearer in the log
        return 2.0 ** min(max(exponent, -126), 127)
    return 1.0 if scale < 2.0**-126 else scale


def _exponent(value: float) -> int:
    """Return the exponent of the largest power of two in a positive number."""
    return math.frexp(value)[1] - 1


def fake_quantize_group(
    values: Sequence[float],
    fmt: NumberFormat,
    scale_format: ScaleFormat = "fp32",
    level: float = 1.0,
) -> list[float]:
    """Return the values of one group after max-scaled quantization and dequantization."""
    scale, zero_point = scale_of_group(values, fmt, scale_format, level)
    return [fake_quantize_value(value, scale, zero_point, fmt) for value in values]


def fake_quantize_value(value: float, scale: float, zero_point: int, fmt: NumberFormat) -> float:
    """Return one value after quantization and dequantization."""
    number = float32(value / scale)
    if not fmt.signed and math.isfinite(number):
        number = float32(round(number) + zero_point)
    return float32((round_value(number, fmt) - zero_point) * scale)


def group_of(index: Sequence[int], shape: Sequence[int], grouping: Grouping) -> tuple[int, int]:
    """Return row and group of the scale of the value at an index of a tensor."""
    if grouping.granularity == "tensor":
        return 0, 0
    axis = grouping.channel_axis
    if axis is None or grouping.granularity == "token":
        row, place = _flat(index[:-1], shape[:-1]), index[-1]
    else:
        axis %= len(shape)
        others = [i for i in range(len(shape)) if i != axis]
        row = index[axis]
        place = _flat([index[i] for i in others], [shape[i] for i in others])
    if grouping.block_size is not None:
        return row // grouping.block_size[0], place // grouping.block_size[1]
    return row, 0 if grouping.group_size is None else place // grouping.group_size


def _flat(index: Sequence[int], shape: Sequence[int]) -> int:
    place = 0
    for i, length in zip(index, shape, strict=True):
        place = place * length + i
    return place


def fake_quantize_tensor(
    values: Sequence[float],
    shape: Sequence[int],
    grouping: Grouping,
    fmt: NumberFormat,
    scale_format: ScaleFormat = "fp32",
) -> list[float]:
    """Return the values of a tensor, in order, after quantization with max scales and back."""
    members = defaultdict(list)
    for place, index in enumerate(product(*map(range, shape))):
        members[group_of(index, shape, grouping)].append(place)
    level = global_scale(values, fmt) if scale_format == "e4m3" else 1.0
    result = [0.0] * len(values)
    for places in members.values():
        kept = fake_quantize_group([values[place] for place in places], fmt, scale_format, level)
        for place, value in zip(places, kept, strict=True):
            result[place] = value
    return result


def pack_codes(codes: Sequence[int], num_bits: int) -> bytes:
    """Return codes as one long number, the first in its lowest bits."""
    stream = sum(code << (place * num_bits) for place, code in enumerate(codes))
    return stream.to_bytes((len(codes) * num_bits + 7) // 8, "little")


def unpack_codes(packed: bytes, num_bits: int, n: int) -> list[int]:
    """Return the ``n`` codes of one long number."""
    stream = int.from_bytes(packed, "little")
    return [stream >> (place * num_bits) & ((1 << num_bits) - 1) for place in range(n)]
