# SPDX-License-Identifier: Apache-2.0
"""How the inputs (or outputs) of a packed layer are quantized.

An :class:`ActivationSpec` says it; :meth:`ActivationSpec.simulate` does it, exactly as the fake
quantizer did. Kernels that take codes know some cases by name (:attr:`ActivationSpec.name`):

``int8_token``    int8, one scale for each row, taken from the row as it comes
``int8_tensor``   int8, one scale for the tensor, calibrated
``fp8_token``     fp8_e4m3, one scale for each row, taken from the row as it comes
``fp8_tensor``    fp8_e4m3, one scale for the tensor, calibrated
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch

from modewright.errors import ConfigError
from modewright.formats.affine import fake_quantize
from modewright.formats.catalogue import NumberFormat, format_named
from modewright.formats.grouping import Granularity, Grouping
from modewright.formats.scaling import ScaleFormat, ScaleRule, global_scale_for, scale_for

INT8_TOKEN = "int8_token"  # noqa: S105 - a token of text
INT8_TENSOR = "int8_tensor"
FP8_TOKEN = "fp8_token"  # noqa: S105
FP8_TENSOR = "fp8_tensor"
_NAMES = {"int8": (INT8_TOKEN, INT8_TENSOR), "fp8_e4m3": (FP8_TOKEN, FP8_TENSOR)}
_GRANULARITIES = ("tensor", "token", "group")


@dataclass(frozen=True)
class ActivationSpec:
    """How one activation tensor is quantized.

    Attributes:
        format: Name of the number format in the catalogue.
        granularity: What shares a scale: ``tensor``, ``token`` (the last axis) or ``group``.
        group_size: Neighbours on the last axis in a group.
        scale_format: What a scale is.
        calibrated: Whether the layer holds a scale; otherwise it comes from each tensor.
        scale_rule: How it comes from the tensor.

    Raises:
        ConfigError: The fields are not those of an activation that there can be.
    """

    format: str
    granularity: Granularity = "tensor"
    group_size: int | None = None
    scale_format: ScaleFormat = "fp32"
    calibrated: bool = False
    scale_rule: ScaleRule = "max"

    def __post_init__(self) -> None:
        format_named(self.format)
        grouped = self.granularity == "group"
        if (
            self.granularity not in _GRANULARITIES
            or grouped is (self.group_size is None)
            or not (self.group_size is None or type(self.group_size) is int)
            or (self.group_size is not None and self.group_size < 1)
            or self.scale_format not in ("fp32", "e8m0", "e4m3")
            or self.scale_rule not in ("max", "least_error")
            or type(self.calibrated) is not bool
            or (self.calibrated and self.granularity != "tensor")
        ):
            raise ConfigError(
                f"There is no quantized activation like {self!r}: granularity is one of "
                f"{_GRANULARITIES}, group_size goes with 'group', and only the scale of a whole "
                "tensor is calibrated."
            )
        for name in ("number_format", "grouping", "name"):
            getattr(self, name)  # made now: torch.compile can read them, but not make them

    @classmethod
    def from_dict(cls, recorded: object) -> ActivationSpec:
        """Return the spec that :meth:`as_dict` described.

        Raises:
            ConfigError: It is no description of one.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(recorded, Mapping) or not known >= set(recorded) >= {"format"}:
            raise ConfigError(
                f"expected the description of a quantized activation, with some of "
                f"{sorted(known)}; received {recorded!r}."
            )
        if not all(isinstance(recorded.get(n, ""), str) for n in ("format", "granularity")):
            raise ConfigError(f"format and granularity are words; received {recorded!r}.")
        return cls(**recorded)

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as JSON; fields without a value are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @cached_property
    def number_format(self) -> NumberFormat:
        """The format of the catalogue."""
        return format_named(self.format)

    @cached_property
    def grouping(self) -> Grouping:
        """How the tensor is cut into groups."""
        return Grouping(self.granularity, self.group_size, None)

    @cached_property
    def name(self) -> str | None:
        """The name under which kernels know this case; ``None`` if it can only be simulated."""
        if self.format not in _NAMES or self.scale_format != "fp32":
            return None
        token, tensor = _NAMES[self.format]
        if self.granularity == "token" and not self.calibrated:
            return token
        return tensor if self.calibrated else None

    def simulate(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what remains of a tensor in low precision: same shape, dtype and device.

        Args:
            x: Any shape, any float dtype.
            scale: ``[1, 1]`` float32 if calibrated; taken from ``x`` if not.
            zero_point: The same, for an unsigned format.
        """
        grouped = self.grouping.split(x)
        if scale is None:
            how = (self.number_format, self.scale_format)
            level = global_scale_for(x, *how, self.scale_rule)
            scale, zero_point = scale_for(grouped, *how, level, self.scale_rule)
        result = fake_quantize(grouped, scale, zero_point, self.number_format)
        return self.grouping.join(result, x.shape)
