# SPDX-License-Identifier: Apache-2.0
"""All number formats by name, the values of their codes, and rounding to them.

A format turns a real number into one of at most 256 values (:func:`round_to`), and each value into
a code of ``num_bits`` bits (:func:`encode`) and back (:func:`decode`). Scales are none of its
business. Arithmetic is float32: values of other dtypes are converted first.

==================  =======================  =================  =========================
                    integers                 floating point     NF4
==================  =======================  =================  =========================
nearest, ties to    even                     even               the lower value
beyond the largest  saturates, infinity too  the same           the same
NaN                 stays NaN                stays NaN          stays NaN
zero                has no sign              keeps its sign     has no sign
code of NaN         that of 0                NaN in fp8, else   that of -1
                                             that of 0
==================  =======================  =================  =========================

Codes of signed integers are two's complement; those of floating-point numbers are sign, exponent,
mantissa; those of NF4 are places in its table.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, get_args

import torch

from modewright.errors import ConfigError, did_you_mean
from modewright.formats.floating import (
    FLOAT_FORMATS,
    NF4,
    FloatFormat,
    TableFormat,
    encode_float,
    encode_table,
    round_float_,
    round_table_,
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
    """Round values to the nearest ones that a format has; values beyond it saturate.

    Args:
        values: Any shape, any float dtype.
        fmt: The format.

    Returns:
        A new tensor, float32, same shape.
    """
    return round_to_(values.to(torch.float32, copy=True), fmt)


def round_to_(values: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Do what :func:`round_to` does with a float32 tensor that it may overwrite.

    Memory that is new costs more than arithmetic: in place, rounding is several times as fast.
    """
    if isinstance(fmt, IntegerFormat):
        return values.round_().clamp_(fmt.qmin, fmt.qmax).add_(0.0)  # -0.0 + 0.0 is 0.0
    if isinstance(fmt, FloatFormat):
        return round_float_(values, fmt)
    return round_table_(values, fmt)


@cache
def code_values(fmt: NumberFormat) -> tuple[float, ...]:
    """Return the value of every code, by code from 0.

    The codes that fp8 formats have for NaN and infinity give these.
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
    if value > fmt.max_value:
        value = math.inf if fmt.has_infinity and not mantissa else math.nan
    return sign * value


@cache
def reach(fmt: NumberFormat) -> tuple[float, float]:
    """Return the ends beyond which a value saturates: half a step outside the format's last values.

    Within them a value moves by no more than half of the step that the format has there.
    """
    ordered = sorted({value for value in code_values(fmt) if math.isfinite(value)})
    low, high = ordered[0], ordered[-1]
    return low - (ordered[1] - low) / 2, high + (high - ordered[-2]) / 2


def encode(values: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Return the codes of values that a format has: any float dtype -> uint8, same shape.

    Args:
        values: What :func:`round_to` or :func:`decode` returned. The table above says what NaN
            gets; infinity gets its code, or that of the largest value where it has none. What
            else the format does not have gets the code of a neighbour.
        fmt: The format.
    """
    values = values.float()
    if isinstance(fmt, FloatFormat):
        return encode_float(values, fmt)
    if isinstance(fmt, TableFormat):
        return encode_table(values, fmt)
    whole = values.nan_to_num(0.0, fmt.max_value, fmt.min_value).to(torch.int16)
    return (whole & ((1 << fmt.num_bits) - 1)).to(torch.uint8)


def decode(codes: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Return the values of codes: uint8 -> float32, same shape.

    Args:
        codes: Numbers below ``2 ** fmt.num_bits``, any shape.
        fmt: The format.
    """
    table = torch.tensor(code_values(fmt), dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)
