# SPDX-License-Identifier: Apache-2.0
"""``Int8Weight``: a packed int8 weight as torch's products of int8 matrices take it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from modewright.runtime.backends.base import short
from modewright.runtime.packed_spec import PackedSpec
from modewright.runtime.packed_weight import PackedWeight


class Int8Weight(NamedTuple):
    """A copy with signed codes.

    Attributes:
        codes: ``[N, K]`` int8.
        scale: One for each output, ``[N]``.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Int8Weight:
        """Return the copy, with scales of a dtype."""
        codes = weight.codes().view(torch.int8).contiguous()
        return cls(codes, weight.effective_scale().flatten().to(dtype).contiguous())

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return int(self.codes.nbytes + self.scale.nbytes)


def no_int8_weight(spec: PackedSpec) -> str | None:
    """Return why a weight is none of signed int8 with a scale per channel; ``None`` if it is."""
    if spec.format != "int8" or spec.granularity != "channel" or spec.scale_format != "fp32":
        return f"it multiplies by int8 with a scale per channel, not {short(spec)}"
    return None
