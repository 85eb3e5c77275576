# SPDX-License-Identifier: Apache-2.0
"""Small floating-point formats, and NF4, whose sixteen values are a table.

A code's top bit is the sign; then come exponent and mantissa, as in IEEE 754 with subnormal
numbers. ``fp8_e5m2`` keeps the top exponent for infinities and NaN, as IEEE 754 does; ``fp8_e4m3``
has one NaN of each sign and no infinity; the others have neither. Sources: OCP 8-bit Floating
Point Specification, revision 1.0 (fp8); OCP Microscaling Formats Specification, version 1.0 (fp6,
fp4); Dettmers et al. 2023, QLoRA, appendix E (NF4).

Rounding is to the nearest value. Values beyond the largest finite one saturate, infinities too
(both specifications allow it, and it is what hardware does for weights and activations); NaN stays
NaN; what rounds to zero keeps its sign, except in NF4, whose zero has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class FloatFormat:
    """A small floating-point format with a sign bit.

    Attributes:
        name: ``fp8_e4m3`` ...
        exponent_bits: Width of the exponent.
        mantissa_bits: Width of the mantissa.
        max_value: The largest finite value.
        has_nan: Whether the code of all ones is NaN.
        has_infinity: Whether the code with the largest exponent and no mantissa is infinity.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max_value: float
    has_nan: bool = False
    has_infinity: bool = False
    signed: bool = True

    @property
    def num_bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the stored exponent."""
        return int((1 << (self.exponent_bits - 1)) - 1)

    @property
    def min_value(self) -> float:
        """The most negative value."""
        return -self.max_value

    @property
    def smallest_normal(self) -> float:
        """The smallest magnitude with an implicit leading one."""
        return float(2.0 ** (1 - self.bias))

    @property
    def smallest(self) -> float:
        """The smallest magnitude but zero: the step between subnormal numbers."""
        return float(2.0 ** (1 - self.bias - self.mantissa_bits))


@dataclass(frozen=True)
class TableFormat:
    """A format whose codes are places in a table of ascending values from -1 to 1."""

    name: str
    values: tuple[float, ...]
    signed: bool = True

    @property
    def num_bits(self) -> int:
        """Width of a code."""
        return (len(self.values) - 1).bit_length()

    @property
    def max_value(self) -> float:
        """The largest value."""
        return self.values[-1]

    @property
    def min_value(self) -> float:
        """The most negative value."""
        return self.values[0]


FP8_E4M3 = FloatFormat("fp8_e4m3", 4, 3, 448.0, has_nan=True)
FP8_E5M2 = FloatFormat("fp8_e5m2", 5, 2, 57344.0, has_nan=True, has_infinity=True)
FP6_E3M2 = FloatFormat("fp6_e3m2", 3, 2, 28.0)
FP6_E2M3 = FloatFormat("fp6_e2m3", 2, 3, 7.5)
FP4_E2M1 = FloatFormat("fp4_e2m1", 2, 1, 6.0)
# Quantiles of the normal distribution, with an exact zero.
NF4 = TableFormat(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
FLOAT_FORMATS: tuple[FloatFormat, ...] = (FP8_E4M3, FP8_E5M2, FP6_E3M2, FP6_E2M3, FP4_E2M1)

_EXPONENT_OF_FLOAT32 = 0x7F800000
_MANTISSA_BITS_OF_FLOAT32 = 23
_BIAS_OF_FLOAT32 = 127


def power_of_two_below(values: torch.Tensor) -> torch.Tensor:
    """Return the largest power of two in each float32 magnitude: float32, same shape.

    Exact, because it reads the exponent. Zero and subnormal values give 0; infinities and NaN give
    infinity.
    """
    return (values.view(torch.int32) & _EXPONENT_OF_FLOAT32).view(torch.float32)


def round_float(values: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    """Round values to the nearest ones of a format, ties to even; float32, same shape."""
    return round_float_(values.to(torch.float32, copy=True), fmt)


def round_float_(values: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    """Do what :func:`round_float` does, in place: ``values`` has to be float32."""
    values.clamp_(fmt.min_value, fmt.max_value)
    step = power_of_two_below(values)
    step.clamp_min_(fmt.smallest_normal).mul_(2.0**-fmt.mantissa_bits)
    return values.div_(step).round_().mul_(step)  # exact: a step is a power of two


def encode_float(values: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    """Return the codes of values that a format has: float32 -> uint8, same shape.

    A normal number has the same exponent and mantissa in float32, but for the bias and the width; a
    subnormal one is a number of steps. Of both counts the larger is right: that of steps ends at
    the smallest normal number, below which the other is too small. NaN and infinity get their
    codes; where a format has none, NaN gets that of zero and infinity that of the largest value.
    """
    mantissa = fmt.mantissa_bits
    above = 2.0 ** math.frexp(fmt.max_value)[1]  # what infinity would be as a normal number
    largest = above if fmt.has_infinity else fmt.max_value
    magnitude = values.abs().clamp_(max=largest)
    normal = magnitude.view(torch.int32) >> (_MANTISSA_BITS_OF_FLOAT32 - mantissa)
    normal -= (_BIAS_OF_FLOAT32 - fmt.bias) << mantissa
    steps = magnitude.clamp_(max=fmt.smallest_normal).div_(fmt.smallest).to(torch.int32)
    codes = torch.maximum(normal, steps).to(torch.uint8)
    codes |= torch.signbit(values).to(torch.uint8) << (fmt.num_bits - 1)
    not_a_number = (1 << (fmt.num_bits - 1)) - 1 if fmt.has_nan else 0
    return codes.masked_fill_(values.isnan(), not_a_number)


def round_table(values: torch.Tensor, fmt: TableFormat) -> torch.Tensor:
    """Round values to the nearest ones of a table, ties to the lower; float32, same shape."""
    return round_table_(values.to(torch.float32, copy=True), fmt)


def round_table_(values: torch.Tensor, fmt: TableFormat) -> torch.Tensor:
    """Do what :func:`round_table` does; ``values`` has to be float32 and is overwritten."""
    table = torch.tensor(fmt.values, dtype=torch.float32, device=values.device)
    places = encode_table(values, fmt).flatten().int()
    rounded = table.index_select(0, places).view(values.shape)
    return rounded.add_(values.clamp_(fmt.min_value, fmt.max_value).mul_(0.0))  # NaN stays NaN


def encode_table(values: torch.Tensor, fmt: TableFormat) -> torch.Tensor:
    """Return the places of the nearest values of a table: float32 -> uint8, same shape.

    The place of a value is the number of middles below it, so NaN gets place 0.
    """
    places = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for middle in _middles(fmt):
        places += (values > middle).view(torch.uint8)
    return places


@cache
def _middles(fmt: TableFormat) -> tuple[float, ...]:
    """Return the largest float32 that rounds down, between any two neighbours of a table."""
    table = torch.tensor(fmt.values, dtype=torch.float64, device="cpu")
    middle = (table[1:] + table[:-1]) / 2  # exact in float64
    below = middle.float()
    lower = torch.nextafter(below, torch.full_like(below, -torch.inf))
    return tuple(torch.where(below.double() > middle, lower, below).tolist())
