# SPDX-License-Identifier: Apache-2.0
"""``Quantizer``: the module that fake-quantizes one tensor.

Its buffers are ``scale`` and, where the format has them, ``zero_point`` (both ``[rows, groups]``
float32) and ``global_scale`` (a float32 scalar that ``scale`` has to be multiplied with). Until a
calibration mode has set them (and always, if it is dynamic) a quantizer takes its scale from the
tensor it is given, so that a model with quantizers always runs.

An algorithm that chooses other codes than the nearest ones leaves them in ``codes``; the quantizer
of a weight then returns what they stand for. The weight itself stays as it was, so that the next
algorithm still knows what it has to approximate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from modewright.calibration.statistics import RangeObserver
from modewright.errors import DataError
from modewright.formats.affine import dequantize, fake_quantize, quantize
from modewright.formats.catalogue import decode, encode, format_named
from modewright.formats.floating import FP8_E4M3, round_float
from modewright.formats.grouping import Grouping
from modewright.formats.scaling import global_scale_for, scale_for, scale_from_range
from modewright.quantization.representation import QuantizerConfig

if TYPE_CHECKING:
    from typing_extensions import Self

BUFFERS = ("scale", "zero_point", "global_scale", "codes")


class Quantizer(nn.Module):
    """Fake-quantizes one tensor.

    Args:
        config: How the tensor is represented.
        channel_axis: The axis of output channels of the tensor; ``None`` if it holds tokens.

    Attributes:
        scale: ``[rows, groups]`` float32, or ``None`` before calibration. Scales in fp8 are to be
            multiplied with ``global_scale``.
        zero_point: The same shape, or ``None`` before calibration and for symmetric formats.
        global_scale: Scalar float32, or ``None`` for scale formats without one.
        codes: Chosen codes, uint8, of the shape of the weight; ``None`` for the nearest ones.
        observer: While one is set, tensors are observed and passed on unchanged.
        enabled: While it is ``False``, tensors are passed on unchanged.
        substitute: While one is set, its result is returned: how an algorithm that learns with
            gradients puts its parameters in the place of buffers.
    """

    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    global_scale: torch.Tensor | None
    codes: torch.Tensor | None

    def __init__(self, config: QuantizerConfig, channel_axis: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.format = format_named(config.format_name)
        self.grouping = Grouping(
            config.granularity, config.group_size, channel_axis, config.block_size
        )
        self.observer: RangeObserver | None = None
        self.enabled = True
        self.substitute: Callable[[torch.Tensor], torch.Tensor] | None = None
        for name in BUFFERS:
            self.register_buffer(name, None)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what remains of ``tensor`` in low precision: same shape, dtype and device."""
        if not self.enabled:
            return tensor
        if self.observer is not None:
            self.observer.update(tensor)
            return tensor
        if self.substitute is not None:
            return self.substitute(tensor)
        if self.codes is not None:
            return self.dequantized(self.codes, tensor.dtype)
        scale = self.effective_scale
        if scale is None:
            return self.fresh(tensor)
        grouped = self.grouping.split(tensor)
        result = fake_quantize(grouped, scale, self.zero_point, self.format)
        return self.grouping.join(result, tensor.shape)

    def fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what remains of ``tensor`` with max scales of its own, whatever is calibrated."""
        grouped = self.fresh_groups(self.grouping.split(tensor))
        return self.grouping.join(grouped, tensor.shape)

    def fresh_groups(self, grouped: torch.Tensor) -> torch.Tensor:
        """Do what :meth:`fresh` does to a grouped tensor."""
        scale, zero_point = self.own_scale(grouped, self.level_of(grouped))
        return fake_quantize(grouped, scale, zero_point, self.format)

    def own_scale(
        self, grouped: torch.Tensor, level: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return effective scale and zero point by the rule of the config, ``[rows, groups]``.

        Args:
            grouped: What :attr:`grouping` makes of the tensor.
            level: The scale of the whole tensor, see :meth:`level_of`.
        """
        config = self.config
        return scale_for(grouped, self.format, config.scale_format, level, config.scale_rule)

    @property
    def effective_scale(self) -> torch.Tensor | None:
        """``scale`` times ``global_scale``: what codes are multiplied with, ``[rows, groups]``."""
        if self.scale is None or self.global_scale is None:
            return self.scale
        return self.scale * self.global_scale

    def dequantized(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what codes of a whole tensor stand for, in its shape.

        Raises:
            DataError: There are no scales.
        """
        scale = self.effective_scale
        if scale is None:
            raise DataError("codes without a scale stand for nothing: calibrate first.")
        grouped = self.grouping.split(decode(codes, self.format))
        values = dequantize(grouped, scale, self.zero_point)
        return self.grouping.join(values.to(dtype), codes.shape)

    def code_values(self) -> torch.Tensor:
        """Return the chosen codes as numbers of the format, float32, in the weight's shape.

        Raises:
            DataError: None were chosen.
        """
        if self.codes is None:
            raise DataError("no codes were chosen for this tensor.")
        return decode(self.codes, self.format)

    def set_from_tensor(self, tensor: torch.Tensor) -> None:
        """Take the scale from a tensor that does not change, such as a weight.

        Raises:
            DataError: The tensor has values that are not finite.
        """
        level = self.level_of(tensor)
        scale, zero_point = self.own_scale(self.grouping.split(tensor), level)
        self.set_scale(scale, zero_point, level)

    def set_from_range(self, minimum: torch.Tensor, maximum: torch.Tensor) -> None:
        """Take the scale from the range that was observed; scalars, one scale for the tensor.

        Raises:
            DataError: The range is not finite.
        """
        low, high = minimum.reshape(1, 1), maximum.reshape(1, 1)
        self.set_scale(*scale_from_range(low, high, self.format, self.config.scale_format))

    def set_scale(
        self,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        global_scale: torch.Tensor | None = None,
    ) -> None:
        """Take effective scales (those that codes are multiplied with); forget chosen codes.

        Raises:
            DataError: They are not finite.
        """
        if not torch.isfinite(scale).all():
            raise DataError("it holds values that are NaN or infinite, so it has no scale.")
        if global_scale is not None:
            scale = round_float(scale / global_scale, FP8_E4M3)
        self.scale = scale
        self.zero_point, self.global_scale = zero_point, global_scale
        self.codes = None

    def forget(self) -> None:
        """Forget scales and codes: they come from each tensor again."""
        for name in BUFFERS:
            setattr(self, name, None)

    def choose(self, values: torch.Tensor) -> None:
        """Fix the codes of a weight.

        Args:
            values: For every value of the weight the number of the format that stands for it
                (what :func:`modewright.formats.affine.quantize` returns, joined), in the shape of
                the weight.
        """
        self.codes = encode(values, self.format)

    def choose_nearest(self, tensor: torch.Tensor) -> None:
        """Fix the nearest codes of a weight, so that changed scales do not change them.

        Raises:
            DataError: There are no scales.
        """
        scale = self.effective_scale
        if scale is None:
            raise DataError("without a scale there are no nearest codes: calibrate first.")
        values = quantize(self.grouping.split(tensor), scale, self.zero_point, self.format)
        self.choose(self.grouping.join(values, tensor.shape))

    def allocate(self, shapes: dict[str, list[int]], device: torch.device | None) -> None:
        """Make room for buffers that are loaded later; until then outputs are NaN.

        Args:
            shapes: By name of the buffer; those left out become ``None``.
            device: Where the buffers are.
        """
        for name in BUFFERS:
            made = None
            if name in shapes:
                kind = torch.uint8 if name == "codes" else torch.float32
                fill = 0 if name == "codes" else torch.nan
                made = torch.full(tuple(shapes[name]), fill, dtype=kind, device=device)
            setattr(self, name, made)

    def shapes(self) -> dict[str, list[int]]:
        """Return the shapes of the buffers that are there: what :meth:`allocate` takes."""
        found = {name: getattr(self, name) for name in BUFFERS}
        return {name: list(tensor.shape) for name, tensor in found.items() if tensor is not None}

    def extra_repr(self) -> str:
        """Return the config in short, such as ``int4, group 64``."""
        parts = [self.format.name, self.config.granularity]
        size = self.config.group_size or self.config.block_size
        parts += [str(size)] * (size is not None)
        parts += ["dynamic"] * self.config.dynamic
        return " ".join(parts)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the scales with the model, but keep them float32 when it is cast."""

        def move(buffer: torch.Tensor) -> torch.Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def level_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the scale of a whole tensor, scalar; ``None`` if the scale format has none."""
        return self.fresh_level(tensor) if self.global_scale is None else self.global_scale

    def fresh_level(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return what :meth:`level_of` returns before calibration."""
        config = self.config
        return global_scale_for(tensor, self.format, config.scale_format, config.scale_rule)


@contextmanager
def disabled(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """Let quantizers pass tensors on unchanged, so that the model computes what it did before."""
    switched = [(quantizer, quantizer.enabled) for quantizer in quantizers]
    try:
        for quantizer, _ in switched:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, was in switched:
            quantizer.enabled = was


def quantizers_of(module: nn.Module) -> list[Quantizer]:
    """Return all quantizers inside a module."""
    return [m for m in module.modules() if isinstance(m, Quantizer)]
