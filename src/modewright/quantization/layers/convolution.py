# SPDX-License-Identifier: Apache-2.0
"""Convolutions, plain and transposed."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

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
        own = cast(nn.Conv2d, self)
        if own.groups != 1:
            return None
        x = x.detach().float()
        if x.ndim == len(own.kernel_size) + 1:
            x = x.unsqueeze(0)
        mode = "constant" if own.padding_mode == "zeros" else own.padding_mode
        x = F.pad(x, own._reversed_padding_repeated_twice, mode=mode)
        sizes = zip(own.kernel_size, own.stride, own.dilation, strict=True)
        for axis, (size, step, dilation) in enumerate(sizes, start=2):
            reach = (size - 1) * dilation + 1
            x = x.unfold(axis, reach, step)[..., ::dilation]  # the window is a new last axis
        patches = x.movedim(1, len(own.kernel_size) + 1)  # [batch, *positions, in, *kernel]
        return patches.flatten(len(own.kernel_size) + 1).flatten(0, -2)


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
