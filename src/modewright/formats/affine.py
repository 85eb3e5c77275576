# SPDX-License-Identifier: Apache-2.0
r"""Affine quantization: real ≈ (code - zero_point) * scale.

All functions work on a *grouped* tensor ``[rows, groups, group]``, in which every innermost vector
shares one ``scale`` (and ``zero_point``) of ``[rows, groups]``; :mod:`modewright.formats.grouping`
makes that view of a tensor. Arithmetic is float32 whatever the dtype of the tensor, and the result
of :func:`fake_quantize` has that dtype again.

What is defined at the edges: a group of zeros stays zero, and one so small that its scale would not
be a normal float32 becomes zero; values beyond the range of a scale saturate, infinities too; NaN
stays NaN; an empty tensor stays empty. Any finite range has a finite scale, but a value within half
a scale of the largest number of its dtype may come out as infinity. A scale taken from a range that
is not finite (in float32) makes its whole group NaN.

Only unsigned integers take a zero point. It is a whole number of steps: values are rounded before
it is added.
"""

from __future__ import annotations

from typing import Any

import torch

from modewright.formats.catalogue import NumberFormat, reach, round_to_


def quantize(
    grouped: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    fmt: NumberFormat,
) -> torch.Tensor:
    """Return the numbers of the format that stand for a grouped tensor: float32, same shape."""
    values = grouped.float() / scale.unsqueeze(-1)
    if zero_point is None:
        return round_to_(values, fmt)
    values.round_().add_(zero_point.unsqueeze(-1))  # an integer, too: it needs no rounding
    return values.clamp_(fmt.min_value, fmt.max_value)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> torch.Tensor:
    """Return the values that numbers of a format stand for, float32, same shape."""
    if zero_point is not None:
        return (codes - zero_point.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    return codes * scale.unsqueeze(-1)


def fake_quantize(
    grouped: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    fmt: NumberFormat,
) -> torch.Tensor:
    """Return what remains of a grouped tensor after quantizing and dequantizing it.

    The gradient passes straight through where the value was in range and is zero where it
    saturated (Bengio et al. 2013, the straight-through estimator): where it lay more than half a
    step beyond the format's last value (:func:`modewright.formats.catalogue.reach`). Scales and
    zero points get no gradient.
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
        fmt: NumberFormat,
    ) -> torch.Tensor:
        ctx.save_for_backward(grouped, scale, zero_point)
        ctx.fmt = fmt
        values = quantize(grouped, scale, zero_point, fmt)
        if zero_point is not None:
            values.sub_(zero_point.unsqueeze(-1))
        return values.mul_(scale.unsqueeze(-1)).to(grouped.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grouped, scale, zero_point = ctx.saved_tensors
        values = grouped.float() / scale.unsqueeze(-1)
        if zero_point is not None:
            values.add_(zero_point.unsqueeze(-1))
        low, high = reach(ctx.fmt)
        return gradient.masked_fill((values < low) | (values > high), 0), None, None, None
