# SPDX-License-Identifier: Apache-2.0
r"""Scales: how they follow from a range, and in which format they are stored.

=======  =========================================================  ==========================
format   what a scale is                                            used by
=======  =========================================================  ==========================
fp32     any positive float32                                       integers, fp8, nf4
e8m0     a power of two (OCP microscaling v1.0)                     mxfp4, mxfp6, mxfp8, mxint8
e4m3     an fp8_e4m3 number times one float32 for the whole tensor  nvfp4
=======  =========================================================  ==========================

All functions return *effective* scales: float32 numbers that the format can hold (times the
tensor's ``global_scale`` for e4m3), ready to multiply with. They are positive and at least
``2 ** -126``, so that dividing by them is safe:

* the scale of a range that is zero is 1, and in e4m3, which has a smallest scale, that one;
* one too small becomes 1 in fp32 (and the group zero), the smallest in e8m0 and e4m3;
* one too large for e4m3 becomes the largest;
* that of a range that is not finite is not finite, and its whole group becomes NaN.

The power of two follows from the range as section 6.3 of the MX specification has it: the exponent
of ``amax`` minus that of the format's largest value. What lies between the largest value and the
next power of two saturates. An integer format of n bits stands for numbers from -2 to 2 there: its
code counts in units of ``2 ** (2 - n)``, which are a part of the scale here (``mxint8``: 1/64).
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from modewright.errors import ConfigError
from modewright.formats.affine import dequantize, quantize
from modewright.formats.catalogue import NumberFormat
from modewright.formats.floating import FP4_E2M1, FP8_E4M3, power_of_two_below, round_float
from modewright.formats.integer import IntegerFormat

ScaleFormat = Literal["fp32", "e8m0", "e4m3"]
ScaleRule = Literal["max", "least_error"]

SMALLEST_E8M0 = 2.0**-126  # one above the format's smallest, which float32 holds as a denormal
LARGEST_E8M0 = 2.0**127
SMALLEST_E4M3 = FP8_E4M3.smallest
SMALLEST_FP32 = torch.finfo(torch.float32).tiny
_FOUR_OVER_SIX = 256.0  # the largest fp8 number of which 3/2 is one too


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
        scale_format: What scales are rounded to.
        global_scale: The tensor's scale, scalar; only for ``"e4m3"``, where ``None`` is 1.

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


def max_scale(
    grouped: torch.Tensor,
    fmt: NumberFormat,
    scale_format: ScaleFormat = "fp32",
    global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scale and zero point of every group of a tensor.

    Args:
        grouped: ``[rows, groups, group]``, any float dtype.
        fmt: The format of the codes.
        scale_format: What scales are rounded to.
        global_scale: The tensor's scale, scalar; only for the scale format ``"e4m3"``.

    Returns:
        ``scale`` and ``zero_point`` (``None`` if the format is signed), ``[rows, groups]`` float32.
    """
    if not grouped.numel():
        ones = torch.ones(grouped.shape[:2], device=grouped.device)
        return ones, None if fmt.signed else torch.zeros_like(ones)
    grouped = grouped.detach()
    minimum, maximum = grouped.amin(dim=-1), grouped.amax(dim=-1)  # faster than aminmax
    return scale_from_range(minimum, maximum, fmt, scale_format, global_scale)


def round_scale(
    scale: torch.Tensor, scale_format: ScaleFormat, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the nearest effective scale that the format holds; float32, positive, same shape.

    The nearest power of two is the nearest in the logarithm.

    Args:
        scale: Scales as they should be, not negative, any shape.
        scale_format: What they are rounded to.
        global_scale: The tensor's scale, scalar; only for ``"e4m3"``, where ``None`` is 1.
    """
    scale = scale.float()
    if scale_format == "e8m0":
        power = power_of_two_below(scale)
        return _in_e8m0(torch.where(scale > power * 2**0.5, power * 2, power), scale)
    if scale_format == "e4m3":
        level = 1.0 if global_scale is None else global_scale
        rounded = round_float(scale / level, FP8_E4M3).clamp_min_(SMALLEST_E4M3) * level
        return torch.where(scale.isfinite(), rounded, scale)
    return torch.where(scale < SMALLEST_FP32, torch.ones_like(scale), scale)


def global_scale_of(
    amax: torch.Tensor, fmt: NumberFormat, largest: float = FP8_E4M3.max_value
) -> torch.Tensor:
    """Return the scale of a whole tensor under which its largest group scale is ``largest``.

    Args:
        amax: The largest magnitude of the tensor, scalar.
        fmt: The format of the values.
        largest: The largest scale that groups may get: 448, or less to leave room above.

    Returns:
        A float32 scalar; 1 where the smallest of the group scales would be too small a number.
    """
    level = amax.float() / (fmt.max_value * largest)
    return torch.where(level < SMALLEST_FP32 / SMALLEST_E4M3, torch.ones_like(level), level)


def scale_for(
    grouped: torch.Tensor,
    fmt: NumberFormat,
    scale_format: ScaleFormat,
    global_scale: torch.Tensor | None,
    rule: ScaleRule,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scale, and for an unsigned format the zero point, that a tensor gets by a rule.

    Args:
        grouped: ``[rows, groups, group]``, any float dtype.
        fmt: The format of the values.
        scale_format: What scales are rounded to.
        global_scale: What :func:`global_scale_for` returned for the tensor.
        rule: ``"max"``, see :func:`max_scale`; or ``"least_error"``, for the scale format
            ``"e8m0"`` :func:`power_of_less_error` and for ``"e4m3"`` :func:`four_over_six`.

    Returns:
        Effective scale and zero point, ``[rows, groups]`` float32.
    """
    if rule == "max" or scale_format == "fp32":
        return max_scale(grouped, fmt, scale_format, global_scale)
    if global_scale is None:
        return power_of_less_error(grouped, fmt), None
    return four_over_six(grouped, global_scale), None


def global_scale_for(
    tensor: torch.Tensor, fmt: NumberFormat, scale_format: ScaleFormat, rule: ScaleRule
) -> torch.Tensor | None:
    """Return the scale of a whole tensor, scalar; ``None`` if the scale format has none."""
    if scale_format != "e4m3":
        return None
    amax = tensor.detach().abs().amax() if tensor.numel() else tensor.new_ones(())
    return global_scale_of(amax, fmt, FP8_E4M3.max_value if rule == "max" else _FOUR_OVER_SIX)


def four_over_six(grouped: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Return the scales of NVFP4 under which 4 or 6 stands for the largest magnitude of a group.

    Between 4 and 6 fp4 has nothing. A group with values there loses less when its largest one
    becomes 4, under a scale half as large again. Each group gets the scale with the smaller squared
    error, 6 where both are equal (Cook et al. 2025, *Four Over Six*).

    Args:
        grouped: ``[rows, groups, group]``, any float dtype.
        global_scale: The tensor's scale, scalar: ``global_scale_of(amax, FP4_E2M1, largest=256)``,
            so that a scale half as large again as the largest is still an fp8_e4m3 number.

    Returns:
        Effective scales, ``[rows, groups]`` float32.
    """
    if not grouped.numel():
        return torch.ones(grouped.shape[:2], dtype=torch.float32, device=grouped.device)
    values = grouped.detach().float()
    amax = values.abs().amax(dim=-1)
    six = round_scale(amax / 6, "e4m3", global_scale)
    four = round_scale(amax / 4, "e4m3", global_scale)
    return torch.where(_squared_error(values, four) < _squared_error(values, six), four, six)


def power_of_less_error(grouped: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Return powers of two: that of the specification, or twice it where that loses less.

    The largest value of a group lies up to a binade above the largest number that its power of two
    can stand for, and saturates. Twice the power holds it, and makes all others coarser. Each group
    gets the power with the smaller squared error, the specification's where both are equal.

    Args:
        grouped: ``[rows, groups, group]``, any float dtype.
        fmt: The format of the values.

    Returns:
        Scales, ``[rows, groups]`` float32.
    """
    if not grouped.numel():
        return torch.ones(grouped.shape[:2], dtype=torch.float32, device=grouped.device)
    values = grouped.detach().float()
    below = _power_of_two(values.abs().amax(dim=-1), fmt)
    above = round_scale(below * 2, "e8m0")
    better = _squared_error(values, above, fmt) < _squared_error(values, below, fmt)
    return torch.where(better, above, below)


def _squared_error(
    values: torch.Tensor, scale: torch.Tensor, fmt: NumberFormat = FP4_E2M1
) -> torch.Tensor:
    left = dequantize(quantize(values, scale, None, fmt), scale, None)
    return left.sub_(values).square_().sum(dim=-1)


def _power_of_two(amax: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Return ``2 ** (floor(log2(amax)) - floor(log2(max_value)))`` without rounding errors."""
    largest = fmt.max_value
    if isinstance(fmt, IntegerFormat):
        largest = float(1 << (fmt.num_bits - 2))
    exponent = math.frexp(largest)[1] - 1
    return _in_e8m0(power_of_two_below(amax) * 2.0**-exponent, amax)


def _in_e8m0(power: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return powers of two within the range of the format; what is said above at its edges."""
    power = power.clamp(SMALLEST_E8M0, LARGEST_E8M0)
    power = torch.where(scale == 0, torch.ones_like(power), power)
    return torch.where(scale.isfinite(), power, scale)
