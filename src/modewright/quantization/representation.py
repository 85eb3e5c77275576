# SPDX-License-Identifier: Apache-2.0
"""How one tensor, and the tensors of one layer, are represented. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

GranularityName = Literal["tensor", "channel", "group", "token"]


class Settings(BaseModel):
    """Base of settings that are no mode's config: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class QuantizerConfig(Settings):
    """How one tensor is represented."""

    num_bits: int = Field(default=8, ge=2, le=8, description="Width of a code: 2 to 8.")
    symmetric: bool = Field(
        default=True,
        description="Signed codes around zero; otherwise unsigned ones and a zero point.",
    )
    granularity: GranularityName = Field(
        default="tensor",
        description="What shares a scale: the tensor, an output channel, a group of inputs of one "
        "channel, or one token (the last axis).",
    )
    group_size: int | None = Field(
        default=None, ge=1, description="Values that share a scale; only with granularity 'group'."
    )
    dynamic: bool = Field(
        default=False, description="Take the scale from each tensor as it comes; no calibration."
    )

    @model_validator(mode="after")
    def _consistent(self) -> QuantizerConfig:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"granularity 'group' and group_size go together: got {self.granularity!r} and "
                f"{self.group_size!r}"
            )
        if self.granularity == "token" and not self.dynamic:
            raise ValueError("granularity 'token' needs dynamic=True: tokens are not known before")
        return self


class SchemeConfig(Settings):
    """How the tensors of one layer are represented; ``None`` leaves one as it is."""

    weights: QuantizerConfig | None = None
    input_activations: QuantizerConfig | None = None
    output_activations: QuantizerConfig | None = None

    @model_validator(mode="after")
    def _fits_tensors(self) -> SchemeConfig:
        if self.weights is not None and self.weights.granularity == "token":
            raise ValueError("weights have no tokens: choose 'tensor', 'channel' or 'group'")
        for name in ("input_activations", "output_activations"):
            quantizer = getattr(self, name)
            if quantizer is not None and quantizer.granularity not in ("tensor", "token"):
                raise ValueError(
                    f"{name} can share scales by 'tensor' or 'token', not {quantizer.granularity!r}"
                )
        return self
