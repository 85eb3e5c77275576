# SPDX-License-Identifier: Apache-2.0
"""The scales of least squared error: by the kernel library where it can, else by tensors."""

from __future__ import annotations

import torch

from modewright.formats.catalogue import NumberFormat
from modewright.formats.integer import IntegerFormat
from modewright.formats.scaling import ScaleFormat, max_scale
from modewright.quantization.algorithms import mse
from modewright.quantization.algorithms.mse import Scales, highest_factor
from modewright.runtime.native.scales import search_scales


def mse_scale(
    grouped: torch.Tensor,
    fmt: NumberFormat,
    scale_format: ScaleFormat = "fp32",
    global_scale: torch.Tensor | None = None,
    *,
    importance: torch.Tensor | None = None,
) -> Scales:
    """Return what :func:`modewright.quantization.algorithms.mse.mse_scale` does, or nearly so.

    The kernel multiplies by the inverse of a scale and adds up in another order, so that of two
    scales with all but the same error it may take the other one.

    Args:
        grouped: ``[rows, groups, group]``, any float dtype.
        fmt: The format of the codes.
        scale_format: What scales are rounded to.
        global_scale: The tensor's scale, scalar; only for the scale format ``"e4m3"``.
        importance: What the squared error of every value counts, broadcastable to ``grouped``.
    """
    if isinstance(fmt, IntegerFormat) and scale_format == "fp32" and grouped.numel():
        values = grouped.detach().float()
        found = search_scales(
            values,
            *max_scale(values, fmt),
            code_range=(fmt.min_value, fmt.max_value),
            highest=highest_factor(fmt) if fmt.signed else 1.0,
            importance=importance,
            steps=mse.STEPS,
            shrink=mse.SHRINK,
        )
        if found is not None:
            return found
    return mse.mse_scale(grouped, fmt, scale_format, global_scale, importance=importance)
