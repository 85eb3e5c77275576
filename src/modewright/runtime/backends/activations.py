# SPDX-License-Identifier: Apache-2.0
"""Activations as int8, in the scales of the scheme."""

from __future__ import annotations

import torch

from modewright.formats.scaling import SMALLEST_FP32


def int8_codes(
    rows: torch.Tensor, act: str | None, act_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (int16, within int8) and scales of rows: ``[M, K]`` -> ``[M, K]``, ``[M, 1]``.

    A row whose scale cannot be told, or that holds a NaN, gets a scale of NaN.
    """
    values = rows.float()
    if act == "int8_tensor" and act_scale is not None:
        scale = act_scale.float().reshape(1, 1).expand(len(values), 1)
        unit, known = scale, ~values.isnan().any(-1, keepdim=True)
    else:
        scale = values.abs().amax(-1, keepdim=True) / 127
        scale = torch.where(scale < SMALLEST_FP32, torch.ones_like(scale), scale)
        known = scale.isfinite()
        unit = torch.where(known, scale, torch.ones_like(scale))
    codes = (values / unit).round_().clamp_(-128, 127).nan_to_num_(0)
    return codes.to(torch.int16), torch.where(known, scale, torch.full_like(scale, torch.nan))
