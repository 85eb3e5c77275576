# SPDX-License-Identifier: Apache-2.0
"""What a user may set on mode ``auto_quantize``. Imports no torch, so that it can be shown fast."""

from __future__ import annotations

from pydantic import Field, field_validator

from modewright.modes.config import ModeConfig
from modewright.quantization.config import SchemeName

DEFAULT_CANDIDATES = ("w2a16", "w3a16_asym", "w4a16_asym", "w5a16_asym", "w6a16_asym", "w8a16")


class AutoQuantizeConfig(ModeConfig):
    """Config of mode ``auto_quantize``."""

    candidates: tuple[SchemeName, ...] = Field(
        default=DEFAULT_CANDIDATES,
        min_length=1,
        description="The schemes of which every group of layers gets one; 'none' leaves it as it "
        "is.",
    )
    targets: tuple[str, ...] | None = Field(
        default=None,
        description="Patterns of the modules to choose for; every kind of layer that can be "
        "quantized, but embeddings, if left out.",
    )
    ignore: tuple[str, ...] = Field(default=(), description="Patterns of modules to leave alone.")

    @field_validator("candidates")
    @classmethod
    def _check_candidates(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"expected different schemes, got {', '.join(value)}")
        if value == ("none",):
            raise ValueError("expected a scheme that quantizes, got 'none' alone")
        return value
