# SPDX-License-Identifier: Apache-2.0
"""``TokenPacker``: vectors that come one after another, such as keys and values, as rows of bytes.

A row is what one vector of ``features`` numbers becomes: its codes without gaps between them, then
its scales (float32) unless they were calibrated, then its zero points (a byte each) if the format
has them. All axes but the last stay, so rows are joined, cut and reordered like the vectors were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modewright.errors import ConfigError
from modewright.formats.affine import dequantize, quantize
from modewright.formats.catalogue import decode, encode
from modewright.formats.grouping import Grouping
from modewright.formats.packing import pack, packed_size, unpack
from modewright.formats.scaling import max_scale
from modewright.runtime.activations import ActivationSpec

_FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class TokenPacker:
    """Packs vectors and unpacks them to exactly what the fake quantizer leaves of them.

    Attributes:
        spec: How a vector is quantized.
        scale: ``[1, 1]`` float32 if that was calibrated.
        zero_point: The same, for an unsigned format.

    Raises:
        ConfigError: A vector alone does not say what its scale is.
    """

    spec: ActivationSpec
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None

    def __post_init__(self) -> None:
        whole = self.spec.granularity == "tensor"
        if self.spec.calibrated is (self.scale is None) or whole is not self.spec.calibrated:
            raise ConfigError(
                f"tokens can be packed one after another only with a calibrated scale for all, or "
                f"scales for each; received {self.spec}. Calibrate first."
            )
        if self.spec.scale_format == "e4m3":
            raise ConfigError("scales in e4m3 depend on all tokens: they cannot be packed singly.")

    def width(self, features: int) -> int:
        """Return the bytes of a row."""
        codes = packed_size(features, self.spec.number_format.num_bits)
        return codes + self._groups(features) * (_FLOAT + self._has_zero_points)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Return vectors ``[..., features]``, any float dtype, as rows uint8 ``[..., width]``."""
        fmt, features = self.spec.number_format, x.shape[-1]
        grouped = self._grouping.split(x.detach())
        scale, zero_point = self.scale, self.zero_point
        if scale is None:
            scale, zero_point = max_scale(grouped, fmt, self.spec.scale_format)
        else:
            scale = scale.to(x.device)
            zero_point = None if zero_point is None else zero_point.to(x.device)
        numbers = self._grouping.join(quantize(grouped, scale, zero_point, fmt), x.shape)
        parts = [pack(encode(numbers, fmt), fmt.num_bits)]
        if self.scale is None:
            shape = (*x.shape[:-1], self._groups(features))
            parts.append(scale.reshape(shape).contiguous().view(torch.uint8))
            if zero_point is not None:
                parts.append(zero_point.reshape(shape).to(torch.uint8))
        return torch.cat(parts, dim=-1)

    def unpack(self, rows: torch.Tensor, features: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what rows stand for, ``[..., features]``."""
        fmt, groups = self.spec.number_format, self._groups(features)
        codes = packed_size(features, fmt.num_bits)
        stored = rows[..., :codes]
        if self.spec.format == "int8":
            numbers = stored.contiguous().view(torch.int8).float()
        elif self.spec.format == "fp8_e4m3":
            numbers = stored.contiguous().view(torch.float8_e4m3fn).float()
        else:
            numbers = decode(unpack(stored, fmt.num_bits, features), fmt)
        scale, zero_point = self.scale, self.zero_point
        if scale is None:
            split = codes + groups * _FLOAT
            aligned = rows[..., codes:split].clone(memory_format=torch.contiguous_format)
            scale = aligned.view(torch.float32).reshape(-1, groups)
            if self._has_zero_points:
                zero_point = rows[..., split:].reshape(-1, groups).float()
        else:
            scale = scale.to(rows.device)
            zero_point = None if zero_point is None else zero_point.to(rows.device)
        shape = torch.Size((*rows.shape[:-1], features))
        values = dequantize(self._grouping.split(numbers), scale, zero_point)
        return self._grouping.join(values.to(dtype), shape)

    @property
    def _grouping(self) -> Grouping:
        return self.spec.grouping

    @property
    def _has_zero_points(self) -> bool:
        return self.scale is None and not self.spec.number_format.signed

    def _groups(self, features: int) -> int:
        """How many scales a row holds."""
        if self.scale is not None:
            return 0
        return -(-features // self.spec.group_size) if self.spec.group_size else 1
