# SPDX-License-Identifier: Apache-2.0
"""Small floating-point formats, and NF4, whose sixteen values are a table.

A code's top bit is the sign; then come exponent and mantissa, as in IEEE 754. Values beyond the
largest finite one saturate, infinities too, as the OCP specifications for 8-bit formats (rev. 1.0)
and microscaling formats (v1.0) allow; NaN stays NaN while it is a value, and has no code in the
formats that lack one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FloatFormat:
    """A small floating-point format with a sign bit.

    Attributes:
        name: ``fp8_e4m3`` ...
        exponent_bits: Width of the exponent.
        mantissa_bits: Width of the mantissa.
        max_value: The largest finite value; what lies above it in the code space is no number.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max_value: float
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


FP8_E4M3 = FloatFormat("fp8_e4m3", 4, 3, 448.0)
FP8_E5M2 = FloatFormat("fp8_e5m2", 5, 2, 57344.0)
FP6_E3M2 = FloatFormat("fp6_e3m2", 3, 2, 28.0)
FP6_E2M3 = FloatFormat("fp6_e2m3", 2, 3, 7.5)
FP4_E2M1 = FloatFormat("fp4_e2m1", 2, 1, 6.0)
# Quantiles of the normal distribution with an exact zero: Dettmers et al. 2023, QLoRA, appendix E.
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


def round_float(values: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    """Round float32 values to the nearest ones of a format, ties to even; float32, same shape."""
    values = values.clamp(fmt.min_value, fmt.max_value)
    power = (values.view(torch.int32) & _EXPONENT_OF_FLOAT32).view(torch.float32)
    step = power.clamp_min(fmt.smallest_normal) * 2.0**-fmt.mantissa_bits
    return torch.round(values / step) * step  # exact: a step is a power of two


def round_table(values: torch.Tensor, fmt: TableFormat) -> torch.Tensor:
    """Round float32 values to the nearest ones of a table, ties to the lower; same shape."""
    table = torch.tensor(fmt.values, device=values.device)
    bounds = (table[1:] + table[:-1]) / 2
    rounded = table[torch.bucketize(values, bounds)]
    return torch.where(values.isnan(), values, rounded)
