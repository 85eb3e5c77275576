# SPDX-License-Identifier: Apache-2.0
"""How one tensor, and the tensors of one layer, are represented. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

GranularityName = Literal["tensor", "channel", "group", "block", "token"]
FormatName = Literal["int", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "nf4"]
ScaleFormatName = Literal["fp32", "e8m0", "e4m3"]
ScaleRuleName = Literal["max", "least_error"]

_BITS_OF: dict[FormatName, int] = {
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "fp6_e3m2": 6,
    "fp6_e2m3": 6,
    "fp4_e2m1": 4,
    "nf4": 4,
}
MEMBERS = ("weights", "input_activations", "output_activations", "kv_cache")
"""The tensors of a layer that a scheme speaks of."""


class Settings(BaseModel):
    """Base of settings that are no mode's config: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class QuantizerConfig(Settings):
    """How one tensor is represented."""

    format: FormatName = Field(
        default="int", description="'int' (of num_bits), or the name of a floating-point format."
    )
    num_bits: int = Field(default=8, ge=2, le=8, description="Width of a code: 2 to 8.")
    symmetric: bool = Field(
        default=True,
        description="Signed codes around zero; otherwise unsigned ones and a zero point.",
    )
    granularity: GranularityName = Field(
        default="tensor",
        description="What shares a scale: the tensor, an output channel, a group of inputs of one "
        "channel, a tile of channels by inputs, or one token (the last axis).",
    )
    group_size: int | None = Field(
        default=None, ge=1, description="Values that share a scale; only with granularity 'group'."
    )
    block_size: tuple[int, int] | None = Field(
        default=None, description="Channels and inputs of a tile; only with granularity 'block'."
    )
    dynamic: bool = Field(
        default=False, description="Take the scale from each tensor as it comes; no calibration."
    )
    scale_format: ScaleFormatName = Field(
        default="fp32",
        description="What a scale is: float32, a power of two (MX), or fp8 times one float32 for "
        "the whole tensor (NVFP4).",
    )
    scale_rule: ScaleRuleName = Field(
        default="max",
        description="How a scale follows from the values it is for: from the largest one, or, "
        "where scales are coarse, the better of that and the next one (MX: twice it; NVFP4: 4 "
        "instead of 6 as the largest value), by the squared error.",
    )

    @model_validator(mode="before")
    @classmethod
    def _bits_of_format(cls, value: object) -> object:
        """Fill in the width that a named format has."""
        if isinstance(value, dict) and value.get("format", "int") in _BITS_OF:
            return {"num_bits": _BITS_OF[value["format"]], **value}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> QuantizerConfig:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"granularity 'group' and group_size go together: got {self.granularity!r} and "
                f"{self.group_size!r}"
            )
        if (self.granularity == "block") != (self.block_size is not None):
            raise ValueError(
                f"granularity 'block' and block_size go together: got {self.granularity!r} and "
                f"{self.block_size!r}"
            )
        if self.granularity == "token" and not self.dynamic:
            raise ValueError("granularity 'token' needs dynamic=True: tokens are not known before")
        if self.format != "int" and self.num_bits != _BITS_OF[self.format]:
            raise ValueError(f"{self.format} has {_BITS_OF[self.format]} bits, not {self.num_bits}")
        if not self.symmetric and (self.format != "int" or self.scale_format != "fp32"):
            raise ValueError("a zero point needs format 'int' and scale_format 'fp32'")
        coarse = {"e8m0"} | ({"e4m3"} if self.format == "fp4_e2m1" else set())
        if self.scale_rule == "least_error" and self.scale_format not in coarse:
            raise ValueError(
                "scale_rule 'least_error' needs scale_format 'e8m0', or 'e4m3' with fp4_e2m1: "
                f"got {self.scale_format!r} with {self.format!r}"
            )
        return self

    @property
    def format_name(self) -> str:
        """The name in the catalogue of formats: ``int4``, ``uint4``, ``fp4_e2m1`` ..."""
        if self.format != "int":
            return self.format
        return f"{'' if self.symmetric else 'u'}int{self.num_bits}"


class SchemeConfig(Settings):
    """How the tensors of one layer are represented; ``None`` leaves one as it is."""

    weights: QuantizerConfig | None = None
    input_activations: QuantizerConfig | None = None
    output_activations: QuantizerConfig | None = None
    kv_cache: QuantizerConfig | None = None

    @model_validator(mode="after")
    def _fits_tensors(self) -> SchemeConfig:
        if self.weights is not None and self.weights.granularity == "token":
            raise ValueError("weights have no tokens: choose 'tensor', 'channel' or 'group'")
        for name in MEMBERS[1:]:
            quantizer = getattr(self, name)
            if quantizer is None:
                continue
            if quantizer.granularity not in ("tensor", "token", "group"):
                raise ValueError(
                    f"{name} can share scales by 'tensor', 'token' or 'group', not "
                    f"{quantizer.granularity!r}"
                )
            if quantizer.granularity == "group" and not quantizer.dynamic:
                raise ValueError(f"{name} in groups need dynamic=True: tokens are not known before")
        return self
