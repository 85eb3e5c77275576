# SPDX-License-Identifier: Apache-2.0
r"""Scales: how they follow from a range, and in which format they are stored.

=======  =========================================================  ==========================
format   what a scale is                                            used by
=======  =========================================================  ==========================
fp32     any positive float32                                       integers, fp8
e8m0     a power of two (OCP microscaling v1.0)                     mxfp4, mxfp6, mxfp8, mxint8
e4m3     an fp8_e4m3 number times one float32 for the whole tensor  nvfp4
=======  =========================================================  ==========================

All functions return *effective* scales: float32 numbers that the format can hold (times the
tensor's ``global_scale`` for e4m3), ready to multiply with.
"""

from __future__ import annotations

from typing import Literal

import torch

from modewright.errors import ConfigError
from modewright.formats.catalogue import NumberFormat
from modewright.formats.floating import FP8_E4M3, round_float
from modewright.formats.integer import IntegerFormat

ScaleFormat = Literal["fp32", "e8m0", "e4m3"]

SMALLEST_E8M0 = 2.0**-126  # one above the format's smallest, which float32 holds as a denormal
LARGEST_E8M0 = 2.0**127
SMALLEST_E4M3 = 2.0**-9


def scale_from_range(
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    fmt: NumberFormat,
    scale_format: ScaleFormat = "fp32",
    global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scale, and for an unsigned format the zero point, that cover a range.

    Args:
        minimum: Smallest value of every group, any shape.
        maximum: Largest value of every group, same shape.
        fmt: A signed format gives a symmetric scale, ``amax / max_value``; an unsigned one spreads
            its codes over ``[min(minimum, 0), max(maximum, 0)]``, so that zero is exact.
        scale_format: What scales are rounded to. Powers of two follow the specification: the
            exponent of ``amax`` minus that of the format's largest value, so that what lies
            between the largest value and the next power of two saturates.
        global_scale: The tensor's scale, scalar; only for ``"e4m3"``.

    Returns:
        ``scale`` float32 and positive, ``zero_point`` float32 with integer values in
        ``[qmin, qmax]`` or ``None``, both of the shape given.

    Raises:
        ConfigError: The format is unsigned and not an integer.
    """
    minimum, maximum = minimum.float().clamp(max=0), maximum.float().clamp(min=0)
    if fmt.signed:
        amax = torch.maximum(-minimum, maximum)
        if scale_format == "e8m0":
            return _power_of_two(amax, fmt), None
        return round_scale(amax / fmt.max_value, scale_format, global_scale), None
    if not isinstance(fmt, IntegerFormat):
        raise ConfigError(f"{fmt.name} has no zero point.")
    steps = fmt.qmax - fmt.qmin
    scale = maximum / steps - minimum / steps  # their difference might overflow
    scale = round_scale(scale, scale_format, global_scale)
    zero_point = (fmt.qmin - minimum / scale).round().clamp(fmt.qmin, fmt.qmax)
    return scale, zero_point


def round_scale(
    scale: torch.Tensor, scale_format: ScaleFormat, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the nearest effective scale that the format holds; float32, positive, same shape.

    A scale that is zero, or too small to divide by, becomes 1 (and its group zero) in fp32; the
    formats with a smallest scale take that one.
    """
    if scale_format == "e8m0":
        rounded = torch.exp2(torch.round(torch.log2(scale)))
        return rounded.clamp(SMALLEST_E8M0, LARGEST_E8M0)
    if scale_format == "e4m3":
        level = 1.0 if global_scale is None else global_scale
        return round_float(scale / level, FP8_E4M3).clamp_min(SMALLEST_E4M3) * level
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(scale < tiny, torch.ones_like(scale), scale)


def global_scale_of(
    amax: torch.Tensor, fmt: NumberFormat, largest: float = FP8_E4M3.max_value
) -> torch.Tensor:
    """Return the scale of a whole tensor under which its largest group scale is ``largest``.

    Args:
        amax: The largest magnitude of the tensor, scalar.
        fmt: The format of the values.
        largest: The largest scale that groups may get: 448, or less to leave room above.
    """
    return round_scale(amax.float() / (fmt.max_value * largest), "fp32")


def _power_of_two(amax: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Return ``2 ** (floor(log2(amax)) - floor(log2(max_value)))`` without rounding errors."""
    largest = fmt.max_value
    if isinstance(fmt, IntegerFormat):
        largest = float(1 << (fmt.num_bits - 2))  # MXINT8 counts in 1/64: its largest power is 1
    exponent = torch.frexp(amax).exponent - torch.frexp(torch.tensor(largest)).exponent
    scale = torch.ldexp(torch.ones_like(amax), exponent.to(amax.device))
    scale = torch.where(amax > 0, scale, torch.ones_like(scale))
    return torch.where(amax.isfinite(), scale.clamp(SMALLEST_E8M0, LARGEST_E8M0), amax)
