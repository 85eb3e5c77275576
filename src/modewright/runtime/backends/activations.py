# SPDX-License-Identifier: Apache-2.0
"""Activations in the scales of the scheme: as int8, and what fp8 leaves of them."""

from __future__ import annotations

import torch

from modewright.formats.scaling import SMALLEST_FP32
from modewright.runtime.backends.portable import simulated
from modewright.runtime.native.between import between
from modewright.runtime.native.library import DTYPES, ROUNDINGS


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


def rounded(x: torch.Tensor, act: str | None, act_scale: torch.Tensor | None) -> torch.Tensor:
    """Return what :func:`~modewright.runtime.backends.portable.simulated` does, on a CPU.

    The kernel library does it, if all numbers are finite.
    """
    kernels = between() if act in ROUNDINGS and x.dtype in DTYPES else None
    if act is None or kernels is None or not x.numel():
        return simulated(x, act, act_scale)
    found = kernels.round(x, act, scale_of(act_scale))
    return simulated(x, act, act_scale) if found is None else found


def scale_of(act_scale: torch.Tensor | None) -> float:
    """Return the scale of a tensor as the kernel library is told it: 0 if each row has its own."""
    return 0.0 if act_scale is None else float(act_scale)
