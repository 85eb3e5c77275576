# SPDX-License-Identifier: Apache-2.0
"""``WeightGrid``: a layer's weight as a matrix, with the scales and codes of its quantizer."""

from __future__ import annotations

import torch

from modewright.errors import ConfigError
from modewright.formats.affine import quantize
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.passes.scales import mse_scale


class WeightGrid:
    """The weight of a layer as ``[out, in]``, and what its quantizer can represent of it.

    Args:
        layer: A quantized layer whose weight has a quantizer.

    Attributes:
        matrix: The weight, float32 ``[out, in]``.
        format: The format of its codes.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        if layer.weight_quantizer is None:
            raise ConfigError("a layer without a weight quantizer has no grid.")
        self.layer = layer
        self.quantizer = layer.weight_quantizer
        self.format = self.quantizer.format
        self.matrix = layer.weight_matrix(layer.to_quantize().detach()).float()

    def grouped(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix ``[out, in]`` as the quantizer groups it: ``[rows, groups, group]``."""
        return self.quantizer.grouping.split(self.layer.from_matrix(matrix))

    def set_scale(
        self, target: torch.Tensor | None = None, *, importance: torch.Tensor | None = None
    ) -> None:
        """Take the scales that fit a target.

        Args:
            target: ``[out, in]``; the weight itself if left out.
            importance: How much the squared error of every value counts, ``[out, in]``; ``None``
                for max scales.
        """
        target = self.matrix if target is None else target
        grouped = self.grouped(target)
        kind = self.quantizer.config.scale_format
        level = self.quantizer.fresh_level(target)
        if importance is None:
            scale, zero_point = self.quantizer.own_scale(grouped, level)
        else:
            weights = self.grouped(importance)
            scale, zero_point = mse_scale(grouped, self.format, kind, level, importance=weights)
        self.quantizer.set_scale(scale, zero_point, level)

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return effective scale and zero point of every value, ``[out, in]``."""
        scale, zero_point = self.quantizer.effective_scale, self.quantizer.zero_point
        if scale is None:
            raise ConfigError("the weight has no scales yet.")
        shape = self.grouped(self.matrix).shape
        return self._joined(scale, shape), (
            None if zero_point is None else self._joined(zero_point, shape)
        )

    def nearest(self, target: torch.Tensor) -> torch.Tensor:
        """Return the nearest numbers of the format, ``[out, in]``."""
        scale = self.quantizer.effective_scale
        if scale is None:
            raise ConfigError("the weight has no scales yet.")
        codes = quantize(self.grouped(target), scale, self.quantizer.zero_point, self.format)
        return self._matrix(codes)

    def rounded(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return what a matrix ``[out, in]`` becomes with max scales of its own."""
        return self._matrix(self.quantizer.fresh_groups(self.grouped(matrix)))

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return what numbers of the format ``[out, in]`` stand for, float32 ``[out, in]``."""
        scale, zero_point = self.expanded()
        return (codes if zero_point is None else codes - zero_point) * scale

    def choose(self, codes: torch.Tensor) -> None:
        """Fix the codes: numbers of the format, ``[out, in]``."""
        self.quantizer.choose(self.layer.from_matrix(codes))

    def _joined(self, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return self._matrix(scale.unsqueeze(-1).expand(shape))

    def _matrix(self, grouped: torch.Tensor) -> torch.Tensor:
        weight = self.layer.weight
        return self.layer.weight_matrix(self.quantizer.grouping.join(grouped, weight.shape))
