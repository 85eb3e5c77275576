# SPDX-License-Identifier: Apache-2.0
"""``PackedSpec``: what a packed weight is, without its tensors. It is what a record holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, cast

import torch

from modewright.errors import ConfigError
from modewright.formats.catalogue import NumberFormat, format_named
from modewright.formats.grouping import Granularity, Grouping
from modewright.formats.integer import IntegerFormat
from modewright.formats.packing import packed_size
from modewright.formats.scaling import ScaleFormat

ScaleDtype = Literal["float16", "float32", "uint8", "float8_e4m3fn"]
_SCALE_DTYPES: dict[str, tuple[str, ...]] = {
    "fp32": ("float16", "float32"),
    "e8m0": ("uint8",),
    "e4m3": ("float8_e4m3fn",),
}


@dataclass(frozen=True)
class PackedSpec:
    """What a packed weight is; everything about its tensors follows.

    Attributes:
        format: Name of the number format in the catalogue: ``int4``, ``uint4``, ``fp4_e2m1`` ...
            Unsigned integers have a zero point, the others none.
        shape: Output and input features.
        granularity: What shares a scale: ``tensor``, ``channel`` (a row), ``group`` or ``block``.
        group_size: Inputs in a group.
        block_size: Rows and inputs in a tile.
        scale_format: What a scale is.
        scale_dtype: As what it is stored.

    Raises:
        ConfigError: The fields are not those of a weight that there can be.
    """

    format: str
    shape: tuple[int, int]
    granularity: Granularity = "channel"
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    scale_format: ScaleFormat = "fp32"
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        format_named(self.format)
        sizes = (*self.shape, *(self.block_size or ()), *((self.group_size,) * self.is_grouped))
        problems = {
            "shape and sizes are not pairs of whole numbers": len(self.shape) != 2
            or (self.block_size is not None and len(self.block_size) != 2)
            or not all(type(size) is int and size >= 0 for size in sizes)
            or 0 in sizes[2:],
            "granularity is not one that weights have": self.granularity
            not in ("tensor", "channel", "group", "block"),
            "group_size goes with granularity 'group' alone": self.is_grouped
            is (self.group_size is None),
            "block_size goes with granularity 'block' alone": (self.granularity == "block")
            is (self.block_size is None),
            f"scale_dtype does not fit; for a scale format it is one of {_SCALE_DTYPES}": (
                self.scale_dtype not in _SCALE_DTYPES.get(self.scale_format, ())
            ),
        }
        found = [problem for problem, there in problems.items() if there]
        if found:
            raise ConfigError(f"There is no packed weight like {self}: {'; '.join(found)}.")
        for name in ("number_format", "code_offset", "has_zero_point", "grouping", "scale_shape"):
            getattr(self, name)  # made now: torch.compile can read them, but not make them

    @classmethod
    def from_dict(cls, recorded: object) -> PackedSpec:
        """Return the spec that :meth:`as_dict` described.

        Raises:
            ConfigError: It is no description of one.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(recorded, Mapping) or not known >= set(recorded) >= {"format", "shape"}:
            raise ConfigError(
                f"expected the description of a packed weight, with some of {sorted(known)}; "
                f"received {recorded!r}."
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in recorded.items()
        }
        for name in ("format", "granularity", "scale_format", "scale_dtype"):
            if not isinstance(values.get(name, ""), str):
                raise ConfigError(
                    f"{name} of a packed weight is a word; received {values[name]!r}."
                )
        for name in ("shape", "block_size"):
            if not isinstance(values.get(name) or (), tuple):
                raise ConfigError(
                    f"{name} of a packed weight is a pair; received {values[name]!r}."
                )
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as JSON; fields without a value are left out."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}

    @property
    def is_grouped(self) -> bool:
        """Whether groups of inputs share scales."""
        return self.granularity == "group"

    @cached_property
    def number_format(self) -> NumberFormat:
        """The format of the catalogue."""
        return format_named(self.format)

    @property
    def num_bits(self) -> int:
        """Width of a code."""
        return self.number_format.num_bits

    @cached_property
    def code_offset(self) -> int:
        """What is added to a number before it is stored: half the codes for signed integers."""
        fmt = self.number_format
        return 1 << (fmt.num_bits - 1) if isinstance(fmt, IntegerFormat) and fmt.signed else 0

    @cached_property
    def has_zero_point(self) -> bool:
        """Whether groups have zero points of their own."""
        return not self.number_format.signed

    @cached_property
    def grouping(self) -> Grouping:
        """How the matrix is cut into groups."""
        return Grouping(self.granularity, self.group_size, 0, self.block_size)

    @cached_property
    def scale_shape(self) -> tuple[int, int]:
        """``(scale rows, groups)``."""
        rows, columns = self.shape
        high, wide = self.tile
        if self.granularity == "tensor":
            return 1, 1
        return -(-rows // high), max(-(-columns // wide), 1 if self.granularity == "channel" else 0)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, columns = self.shape
        if self.granularity == "block" and self.block_size is not None:
            return self.block_size
        if self.granularity == "tensor":
            return max(rows, 1), max(columns, 1)
        return 1, self.group_size or max(columns, 1)

    def tensor_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that such a weight has, by name."""
        rows, columns = self.shape
        scale_rows, groups = self.scale_shape
        made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "packed": ((rows, packed_size(columns, self.num_bits)), torch.uint8),
            "scale": ((scale_rows, groups), cast(torch.dtype, getattr(torch, self.scale_dtype))),
        }
        if self.has_zero_point:
            width = packed_size(groups, self.num_bits)
            made["zero_point"] = ((scale_rows, width), torch.uint8)
        if self.scale_format == "e4m3":
            made["global_scale"] = ((), torch.float32)
        return made

    def __str__(self) -> str:
        size = self.group_size or self.block_size
        parts = [self.format, self.granularity, *([str(size)] * (size is not None))]
        return f"{' '.join(parts)}, {self.scale_format} scales, {list(self.shape)}"
