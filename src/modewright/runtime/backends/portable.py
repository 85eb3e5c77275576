# SPDX-License-Identifier: Apache-2.0
"""Unpack, multiply. Right for every format, dtype and device, and differentiable."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from modewright.runtime.activations import ActivationSpec
from modewright.runtime.backends.base import Backend, Case
from modewright.runtime.packed_weight import PackedWeight

_ACTIVATIONS = {
    "int8_token": ActivationSpec("int8", "token"),
    "int8_tensor": ActivationSpec("int8", "tensor", calibrated=True),
    "fp8_token": ActivationSpec("fp8_e4m3", "token"),
    "fp8_tensor": ActivationSpec("fp8_e4m3", "tensor", calibrated=True),
}


class Portable(Backend):
    """Dequantizes the whole weight for each call."""

    name = "portable"
    summary = "unpack the weight for each call, multiply in the dtype of the activations"
    needs = "nothing"
    accuracy = 1e-6
    differentiable = True

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        return None

    def prepare(self, weight: PackedWeight) -> PackedWeight:
        """Return another view of the same tensors."""
        return weight.map(lambda tensor: tensor)

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: PackedWeight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        return portable_linear(x, prepared, bias, act, act_scale)


def portable_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    act: str | None,
    act_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Return what every other backend approximates."""
    x = simulated(x, act, act_scale)
    return F.linear(x, weight.dequantize(dtype=x.dtype), bias)


def simulated(x: torch.Tensor, act: str | None, act_scale: torch.Tensor | None) -> torch.Tensor:
    """Return what the scheme leaves of activations."""
    return x if act is None else _ACTIVATIONS[act].simulate(x, act_scale)
