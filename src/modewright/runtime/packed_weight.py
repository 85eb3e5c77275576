# SPDX-License-Identifier: Apache-2.0
"""``PackedWeight``: one low-precision matrix ``[out_features, in_features]`` as it is stored.

There is one layout. What the state dict holds is what lies in memory and what kernels read:

================  ============================================================================
tensor            holds
================  ============================================================================
``packed``        codes, uint8 ``[out, packed_size(in, num_bits)]``: every row is one stream of
                  bits without gaps (:mod:`modewright.formats.packing`). Codes of *signed
                  integers* are stored as ``number + 2 ** (num_bits - 1)`` (offset binary), all
                  others as the catalogue has them.
``scale``         ``[scale rows, groups]``, see :mod:`modewright.formats.grouping`: float16 or
                  float32; the exponent plus 127 as uint8 for ``e8m0``; float8_e4m3fn for ``e4m3``
``zero_point``    ``None``, or codes packed as those above, uint8
                  ``[scale rows, packed_size(groups, num_bits)]``
``global_scale``  ``None``, or the float32 scalar that scales in ``e4m3`` are multiplied with
================  ============================================================================

So a number is ``(code - zero_point) * scale``, where the zero point of signed integers is implied:
``2 ** (num_bits - 1)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch.nn import functional as F  # noqa: N812

from modewright.errors import ConfigError
from modewright.formats.catalogue import decode
from modewright.formats.integer import IntegerFormat
from modewright.formats.packing import pack, unpack
from modewright.runtime.packed_spec import PackedSpec, ScaleDtype

__all__ = ["TENSORS", "PackedSpec", "PackedWeight", "fits_float16", "stored_scale"]

TENSORS = ("packed", "scale", "zero_point", "global_scale")
"""The tensors of a packed weight, by the names of its attributes."""

_E8M0_BIAS = 127


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A spec and its tensors; the module's docstring says what is in them.

    Two are equal only if they are the same object.

    Attributes:
        plans: What backends prepared for this weight; not copied with it.

    Raises:
        ConfigError: A tensor has another shape, dtype or layout than the spec says.
    """

    spec: PackedSpec
    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this object alone."""
        return {**self.__dict__, "plans": {}}

    def __post_init__(self) -> None:
        expected = self.spec.tensor_shapes()
        for name in TENSORS:
            tensor: torch.Tensor | None = getattr(self, name)
            wanted = expected.get(name)
            found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            if found != wanted or (tensor is not None and not tensor.is_contiguous()):
                raise ConfigError(
                    f"{name} of a packed weight ({self.spec}): expected {_described(wanted)}; "
                    f"received {_described(found)}"
                    f"{' that is not contiguous' if found == wanted else ''}."
                )

    @classmethod
    def from_codes(
        cls,
        spec: PackedSpec,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> PackedWeight:
        """Pack a matrix.

        Args:
            spec: What to make.
            codes: ``[out, in]`` uint8, codes of the catalogue.
            scale: ``spec.scale_shape`` float32, to be multiplied with ``global_scale`` in e4m3.
            zero_point: The same shape, whole numbers; for unsigned integers.
            global_scale: Scalar; for ``e4m3``.

        Raises:
            ConfigError: Shapes do not fit, or scales or zero points cannot be stored like this.
        """
        offset = spec.code_offset  # flipping the sign bit adds it: two's complement to offset
        stored = pack(codes ^ offset if offset else codes, spec.num_bits).contiguous()
        zeros = None if zero_point is None else _stored_zero_points(zero_point, spec)
        level = None if global_scale is None else global_scale.float().reshape(())
        return cls(spec, stored, stored_scale(scale, spec.scale_dtype), zeros, level)

    @classmethod
    def allocate(cls, spec: PackedSpec, device: torch.device | str | None = None) -> PackedWeight:
        """Return a weight whose tensors are not filled yet; they can be on ``"meta"``."""
        made = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in spec.tensor_shapes().items()
        }
        return cls(spec, **made)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are there, by name."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedWeight:
        """Return a weight of the same spec whose tensors are what a function makes of them."""
        return PackedWeight(self.spec, **{n: function(t) for n, t in self.tensors().items()})

    def codes(self) -> torch.Tensor:
        """Return the codes of the catalogue, ``[out, in]`` uint8."""
        stored = unpack(self.packed, self.spec.num_bits, self.spec.shape[1])
        return stored ^ self.spec.code_offset if self.spec.code_offset else stored

    def effective_scale(self) -> torch.Tensor:
        """Return what codes are multiplied with: ``scale`` as float32, times ``global_scale``."""
        if self.spec.scale_format == "e8m0":
            exponent = self.scale.to(torch.int32) - _E8M0_BIAS
            return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
        scale = self.scale.float()
        return scale if self.global_scale is None else scale * self.global_scale

    def zero_points(self) -> torch.Tensor | None:
        """Return the zero points as numbers, ``[scale rows, groups]`` float32."""
        if self.zero_point is None:
            return None
        return unpack(self.zero_point, self.spec.num_bits, self.spec.scale_shape[1]).float()

    def dequantize(
        self, rows: slice | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return what some rows stand for, ``[n, in]``; all of them without ``rows``.

        Arithmetic is float32, in the order of :func:`modewright.formats.affine.dequantize`.
        """
        if rows is None:
            return self._values(self.packed, slice(None)).to(dtype)
        return self._values(self.packed[rows], rows).to(dtype)

    def select_rows(
        self, indices: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return the rows of some indices, ``[*indices.shape, in]``; only they are unpacked."""
        flat = indices.reshape(-1)
        values = self._values(self.packed.index_select(0, flat), flat)
        return values.to(dtype).reshape(*indices.shape, self.spec.shape[1])

    def _values(self, packed: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return what packed rows stand for, float32; ``rows`` says which rows they are."""
        spec = self.spec
        stored = unpack(packed, spec.num_bits, spec.shape[1])
        if isinstance(spec.number_format, IntegerFormat):
            numbers = stored.float()
            if spec.code_offset:
                numbers -= spec.code_offset
        else:
            numbers = decode(stored, spec.number_format)
        columns, wide = spec.shape[1], spec.tile[1]
        missing = -columns % wide if spec.granularity in ("group", "block") else 0
        grouped = F.pad(numbers, (0, missing)) if missing else numbers
        grouped = grouped.reshape(len(packed), spec.scale_shape[1], wide if columns else 0)
        zero_points = self.zero_points()
        if zero_points is not None:
            grouped = grouped - self._of_rows(zero_points, rows).unsqueeze(-1)
        grouped = grouped * self._of_rows(self.effective_scale(), rows).unsqueeze(-1)
        return grouped.flatten(1)[:, :columns]

    def _of_rows(self, values: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return the scales (or zero points) that belong to rows of the matrix."""
        high = self.spec.tile[0]
        if high == 1:
            return values[rows]
        if isinstance(rows, slice):
            rows = torch.arange(self.spec.shape[0], device=values.device)[rows]
        return values.index_select(0, rows // high)


def stored_scale(scale: torch.Tensor, dtype: ScaleDtype) -> torch.Tensor:
    """Return scales as they are stored.

    Args:
        scale: Positive, float32, any shape.
        dtype: ``float16`` rounds them to the nearest; the other dtypes must hold them exactly.

    Raises:
        ConfigError: They cannot be stored like this.
    """
    if dtype not in get_args(ScaleDtype):
        raise ConfigError(f"scales are stored as {get_args(ScaleDtype)}; received {dtype!r}.")
    if dtype == "uint8":
        mantissa, exponent = torch.frexp(scale.float())
        byte = exponent - 1 + _E8M0_BIAS
        if scale.numel() and not bool(((mantissa == 0.5) & (byte >= 0) & (byte < 255)).all()):
            raise ConfigError("scales of format e8m0 are powers of two; received others.")
        return byte.to(torch.uint8).contiguous()
    made = scale.to(getattr(torch, dtype)).contiguous()
    if dtype == "float16" and not fits_float16(scale):
        raise ConfigError("some scales are no normal float16 numbers: store them as float32.")
    if dtype == "float8_e4m3fn" and not torch.equal(made.float(), scale.float()):
        raise ConfigError("scales of format e4m3 are fp8_e4m3 numbers; received others.")
    return made


def fits_float16(scale: torch.Tensor) -> bool:
    """Whether all scales are normal float16 numbers once rounded."""
    if not scale.numel():
        return True
    info = torch.finfo(torch.float16)
    low, high = torch.aminmax(scale.float())
    return bool((low >= info.tiny) & (high <= info.max))


def _stored_zero_points(zero_point: torch.Tensor, spec: PackedSpec) -> torch.Tensor:
    whole = zero_point.round()
    largest = (1 << spec.num_bits) - 1
    fine = (whole == zero_point) & (whole >= 0) & (whole <= largest)
    if zero_point.numel() and not bool(fine.all()):
        raise ConfigError(
            f"zero points of {spec.format} are whole numbers from 0 to {largest}; received others."
        )
    return pack(whole.to(torch.uint8), spec.num_bits).contiguous()


def _described(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "no tensor" if tensor is None else f"{tensor[1]} of shape {list(tensor[0])}"
