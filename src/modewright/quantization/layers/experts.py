# SPDX-License-Identifier: Apache-2.0
"""Fused experts: the weights of all experts of a layer in one 3-D parameter.

Most store ``[experts, out, in]``, some ``[experts, in, out]``. A quantizer gets the matrix
``[experts * out, in]``, so scales are per expert and output channel, and groups lie along inputs.
(A tile of granularity ``block`` may hold channels of two experts if ``out`` does not fill tiles.)
Inputs are quantized where they enter the layer; what lies between the two products is not seen from
outside and keeps its precision.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from modewright.layers.experts import fused_parameters, is_transposed
from modewright.quantization.layers.base import QuantizedLayer


class ExpertsForward(QuantizedLayer):
    """Quantized experts, with the arithmetic of their own class."""

    @classmethod
    def parameter_names(cls, module: nn.Module) -> tuple[str, ...]:  # noqa: D102
        return fused_parameters(module)

    @classmethod
    def arranged(cls, module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:  # noqa: D102
        if is_transposed(module, name):
            tensor = tensor.transpose(1, 2)
        return tensor.flatten(0, 1)

    @classmethod
    def rearranged(cls, module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:  # noqa: D102
        shape = cast(torch.Tensor, module._parameters[name]).shape
        if not is_transposed(module, name):
            return tensor.reshape(shape)
        return tensor.reshape(shape[0], shape[2], shape[1]).transpose(1, 2).contiguous()
