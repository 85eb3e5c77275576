# SPDX-License-Identifier: Apache-2.0
r"""Affine quantization: real ≈ (code - zero_point) * scale.

All functions work on a *grouped* tensor ``[rows, groups, group]``, in which every innermost vector
shares one ``scale`` (and ``zero_point``) of ``[rows, groups]``; :mod:`modewright.formats.grouping`
makes that view of a tensor. Rounding is half to even. Arithmetic is float32 whatever the dtype of
the tensor, and the result has that dtype again.

What is defined at the edges: a group of zeros has scale 1 and stays zero, and one so small that its
scale would not be a normal float32 becomes zero; values beyond the range of a scale saturate,
infinities too; NaN stays NaN; an empty tensor stays empty. Any finite range has a finite scale, but
a value within half a scale of the largest number of its dtype may come out as infinity. A scale
taken from a range that is not finite makes its whole group NaN.
"""

from __future__ import annotations

from typing import Any

import torch

from modewright.formats.integer import IntegerFormat


def scale_from_range(
    minimum: torch.Tensor, maximum: torch.Tensor, fmt: IntegerFormat
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scale, and for an unsigned format the zero point, that cover a range.

    Args:
        minimum: Smallest value of every group, any shape.
        maximum: Largest value of every group, same shape.
        fmt: A signed format gives a symmetric scale, ``amax / qmax``; an unsigned one spreads its
            codes over ``[min(minimum, 0), max(maximum, 0)]``, so that zero is exact.

    Returns:
        ``scale`` float32 and positive, ``zero_point`` float32 with integer values in
        ``[qmin, qmax]`` or ``None``, both of the shape given.
    """
    minimum, maximum = minimum.float().clamp(max=0), maximum.float().clamp(min=0)
    if fmt.signed:
        span = torch.maximum(-minimum, maximum)
        return _positive(span / fmt.qmax), None
    steps = fmt.qmax - fmt.qmin
    scale = _positive(maximum / steps - minimum / steps)  # their difference might overflow
    zero_point = (fmt.qmin - minimum / scale).round().clamp(fmt.qmin, fmt.qmax)
    return scale, zero_point


def quantize(
    grouped: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    fmt: IntegerFormat,
) -> torch.Tensor:
    """Return the codes of a grouped tensor: float32 with integer values, same shape."""
    return _unbounded_codes(grouped, scale, zero_point).clamp(fmt.qmin, fmt.qmax)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> torch.Tensor:
    """Return the values of codes, float32, same shape."""
    if zero_point is not None:
        codes = codes - zero_point.unsqueeze(-1)
    return codes * scale.unsqueeze(-1)


def fake_quantize(
    grouped: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    fmt: IntegerFormat,
) -> torch.Tensor:
    """Return what remains of a grouped tensor after quantizing and dequantizing it.

    The gradient passes straight through where the value was in range and is zero where it
    saturated (Bengio et al. 2013, the straight-through estimator).
    """
    result: torch.Tensor = _FakeQuantize.apply(grouped, scale, zero_point, fmt)  # type: ignore[no-untyped-call]
    return result


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grouped: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        fmt: IntegerFormat,
    ) -> torch.Tensor:
        ctx.save_for_backward(grouped, scale, zero_point)
        ctx.fmt = fmt
        codes = quantize(grouped, scale, zero_point, fmt)
        return dequantize(codes, scale, zero_point).to(grouped.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grouped, scale, zero_point = ctx.saved_tensors
        codes = _unbounded_codes(grouped, scale, zero_point)
        saturated = (codes < ctx.fmt.qmin) | (codes > ctx.fmt.qmax)
        return gradient.masked_fill(saturated, 0), None, None, None


def _unbounded_codes(
    grouped: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> torch.Tensor:
    codes = torch.round(grouped.float() / scale.unsqueeze(-1))
    return codes if zero_point is None else codes + zero_point.unsqueeze(-1)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """Replace scales that are zero, or too small to divide by, by 1: their group becomes zero."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(scale < tiny, torch.ones_like(scale), scale)
