# SPDX-License-Identifier: Apache-2.0
"""Max scales: nothing saturates.

The scale of a group is its largest magnitude over the largest code. It is the only choice that
clips nothing, needs one pass, and has a bound: no value moves by more than half a scale (a
whole one with a zero point, which is rounded too).
"""

from __future__ import annotations

import torch

from modewright.formats.catalogue import NumberFormat
from modewright.formats.scaling import ScaleFormat, scale_from_range


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
    minimum, maximum = torch.aminmax(grouped.detach(), dim=-1)
    return scale_from_range(minimum, maximum, fmt, scale_format, global_scale)
