# SPDX-License-Identifier: Apache-2.0
"""Convolutions, plain and transposed."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.layers.matrices import patches
from modewright.quantization.layers.base import QuantizedLayer
from modewright.quantization.layers.linear import LinearLike


class ConvForward(LinearLike):
    """Quantized :class:`torch.nn.Conv1d`, ``Conv2d`` and ``Conv3d``."""

    token_inputs = False

    @property
    def feature_axis(self) -> int:  # noqa: D102
        return -len(cast(nn.Conv2d, self).kernel_size) - 1

    @property
    def has_rows(self) -> bool:  # noqa: D102
        return cast(nn.Conv2d, self).groups == 1

    @property
    def columns_per_feature(self) -> int:  # noqa: D102
        return math.prod(cast(nn.Conv2d, self).kernel_size)

    def product(  # noqa: D102
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        own: Any = self
        return cast(torch.Tensor, own._conv_forward(input, weight, bias))

    def input_rows(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the patches that the kernel slides over, ``[positions, in * kernel]``."""
        if cast(nn.Conv2d, self).groups != 1:
            return None
        return patches(self, x.detach().float())


class ConvTransposeForward(QuantizedLayer):
    """Quantized :class:`torch.nn.ConvTranspose1d`, ``ConvTranspose2d`` and ``ConvTranspose3d``."""

    channel_axis = 1
    token_inputs = False

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:  # noqa: D102
        own = cast(nn.ConvTranspose2d, self)
        dimensions = own.weight.ndim - 2
        function: Any = getattr(F, f"conv_transpose{dimensions}d")
        padding = own._output_padding(
            input,
            output_size,
            own.stride,  # type: ignore[arg-type]
            own.padding,  # type: ignore[arg-type]
            own.kernel_size,  # type: ignore[arg-type]
            dimensions,
            own.dilation,  # type: ignore[arg-type]
        )
        result = function(
            self.quantized_input(input),
            self.quantized_weight(),
            own.bias,
            own.stride,
            own.padding,
            padding,
            own.groups,
            own.dilation,
        )
        return self.quantized_output(result)
