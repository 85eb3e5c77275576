# SPDX-License-Identifier: Apache-2.0
"""All number formats by name, the values of their codes, and rounding to them."""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch

from modewright.errors import ConfigError, did_you_mean
from modewright.formats.floating import (
    FLOAT_FORMATS,
    NF4,
    FloatFormat,
    TableFormat,
    round_float,
    round_table,
)
from modewright.formats.integer import ALL_INTEGER_FORMATS, IntegerFormat

NumberFormat = IntegerFormat | FloatFormat | TableFormat
FloatName = Literal["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "nf4"]

_ALL: tuple[NumberFormat, ...] = (*ALL_INTEGER_FORMATS, *FLOAT_FORMATS, NF4)
FORMATS: dict[str, NumberFormat] = {fmt.name: fmt for fmt in _ALL}
FLOAT_NAMES: tuple[str, ...] = get_args(FloatName)


def format_named(name: str) -> NumberFormat:
    """Return a format of the catalogue.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in FORMATS:
        raise ConfigError(
            f"There is no number format {name!r}.{did_you_mean(name, FORMATS)} "
            f"Known: {', '.join(FORMATS)}."
        )
    return FORMATS[name]


def round_to(values: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Round float32 values to the nearest ones that a format has; values beyond it saturate."""
    if isinstance(fmt, IntegerFormat):
        return torch.round(values).clamp(fmt.qmin, fmt.qmax)
    if isinstance(fmt, FloatFormat):
        return round_float(values, fmt)
    return round_table(values, fmt)


@cache
def code_values(fmt: NumberFormat) -> tuple[float, ...]:
    """Return the value of every code, by code from 0; codes that are no number give NaN.

    Codes of signed integers are two's complement.
    """
    if isinstance(fmt, TableFormat):
        return fmt.values
    if isinstance(fmt, IntegerFormat):
        count = 1 << fmt.num_bits
        return tuple(float(c - count if c > fmt.qmax else c) for c in range(count))
    return tuple(_float_value(code, fmt) for code in range(1 << fmt.num_bits))


def _float_value(code: int, fmt: FloatFormat) -> float:
    sign = -1.0 if code >> (fmt.num_bits - 1) else 1.0
    mantissa = code & ((1 << fmt.mantissa_bits) - 1)
    exponent = (code >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    fraction = mantissa / (1 << fmt.mantissa_bits)
    if exponent:
        value = (1.0 + fraction) * 2.0 ** (exponent - fmt.bias)
    else:
        value = fraction * fmt.smallest_normal
    return sign * value if value <= fmt.max_value else float("nan")


def encode(values: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Return the codes of values that a format has, uint8, same shape.

    Args:
        values: What :func:`round_to` returned; anything else gets the code of a neighbour.
        fmt: The format.
    """
    if isinstance(fmt, IntegerFormat):
        return (values.to(torch.int16) & ((1 << fmt.num_bits) - 1)).to(torch.uint8)
    known = torch.tensor(code_values(fmt), device=values.device)
    finite = torch.nonzero(~known.isnan()).flatten()
    ascending, order = torch.sort(known[finite], stable=True)  # -0.0 and 0.0 keep their order
    codes = finite[order].to(torch.uint8)
    place = torch.searchsorted(ascending, values.float().contiguous()).clamp(max=len(codes) - 1)
    found = codes[place]
    if isinstance(fmt, FloatFormat):  # both zeros are found at the same place
        sign = torch.signbit(values).to(torch.uint8) << (fmt.num_bits - 1)
        found = torch.where(values == 0, sign, found)
    return found


def decode(codes: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Return the values of codes: uint8 -> float32, same shape."""
    table = torch.tensor(code_values(fmt), device=codes.device)
    return table[codes.long()]
