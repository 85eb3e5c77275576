# SPDX-License-Identifier: Apache-2.0
"""The portable product: unpack, multiply. Right for every format, dtype and device."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from modewright.runtime.activations import ActivationSpec
from modewright.runtime.packed_weight import PackedWeight

_SPECS = {
    "int8_token": ActivationSpec("int8", "token"),
    "int8_tensor": ActivationSpec("int8", "tensor", calibrated=True),
}


def linear(
    weight: PackedWeight,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    act: str | None = None,
    act_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias``, ``[..., K]`` -> ``[..., N]``."""
    if act is not None:
        x = _SPECS[act].simulate(x, act_scale)
    return F.linear(x, weight.dequantize(dtype=x.dtype), bias)
