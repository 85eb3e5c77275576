# SPDX-License-Identifier: Apache-2.0
"""``Quantizer``: the module that fake-quantizes one tensor.

Its buffers are ``scale`` and, for asymmetric formats, ``zero_point``, both ``[rows, groups]``
float32. Until a calibration mode has set them (and always, if it is dynamic) a quantizer takes its
scale from the tensor it is given, so that a model with quantizers always runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from modewright.calibration.statistics import RangeObserver
from modewright.errors import DataError
from modewright.formats.affine import fake_quantize, scale_from_range
from modewright.formats.grouping import Grouping
from modewright.formats.integer import integer_format
from modewright.quantization.algorithms.max import max_scale
from modewright.quantization.representation import QuantizerConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class Quantizer(nn.Module):
    """Fake-quantizes one tensor.

    Args:
        config: How the tensor is represented.
        channel_axis: The axis of output channels of the tensor.

    Attributes:
        scale: ``[rows, groups]`` float32, or ``None`` before calibration.
        zero_point: The same shape, or ``None`` before calibration and for symmetric formats.
        observer: While one is set, tensors are observed and passed on unchanged.
    """

    scale: torch.Tensor | None
    zero_point: torch.Tensor | None

    def __init__(self, config: QuantizerConfig, channel_axis: int = 0) -> None:
        super().__init__()
        self.config = config
        self.format = integer_format(config.num_bits, symmetric=config.symmetric)
        self.grouping = Grouping(config.granularity, config.group_size, channel_axis)
        self.observer: RangeObserver | None = None
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what remains of ``tensor`` in low precision: same shape, dtype and device."""
        if self.observer is not None:
            self.observer.update(tensor)
            return tensor
        grouped = self.grouping.split(tensor)
        scale, zero_point = self.scale, self.zero_point
        if scale is None:
            scale, zero_point = max_scale(grouped, self.format)
        result = fake_quantize(grouped, scale, zero_point, self.format)
        return self.grouping.join(result, tensor.shape)

    def set_from_tensor(self, tensor: torch.Tensor) -> None:
        """Take the scale from a tensor that does not change, such as a weight.

        Raises:
            DataError: The tensor has values that are not finite.
        """
        self._set(*max_scale(self.grouping.split(tensor), self.format))

    def set_from_range(self, minimum: torch.Tensor, maximum: torch.Tensor) -> None:
        """Take the scale from the range that was observed; scalars, one scale for the tensor.

        Raises:
            DataError: The range is not finite.
        """
        self._set(*scale_from_range(minimum.reshape(1, 1), maximum.reshape(1, 1), self.format))

    def allocate(self, shape: tuple[int, int], device: torch.device | None) -> None:
        """Make room for a scale that is loaded later; until then it is NaN, and so are outputs."""
        self.scale = torch.full(shape, torch.nan, device=device)
        if not self.config.symmetric:
            self.zero_point = torch.full(shape, torch.nan, device=device)

    def extra_repr(self) -> str:
        """Return the config in short, such as ``int4, group 64``."""
        parts = [self.format.name, self.config.granularity]
        parts += [str(self.config.group_size)] * (self.config.group_size is not None)
        parts += ["dynamic"] * self.config.dynamic
        return " ".join(parts)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the scales with the model, but keep them float32 when it is cast."""

        def move(buffer: torch.Tensor) -> torch.Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _set(self, scale: torch.Tensor, zero_point: torch.Tensor | None) -> None:
        if not torch.isfinite(scale).all():
            raise DataError("it holds values that are NaN or infinite, so it has no scale.")
        self.scale, self.zero_point = scale, zero_point
