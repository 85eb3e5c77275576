# SPDX-License-Identifier: Apache-2.0
"""What a user may set on the quantization modes. Imports no torch, so that it can be shown fast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from modewright.modes.config import ModeConfig
from modewright.quantization.representation import (
    FormatName,
    GranularityName,
    QuantizerConfig,
    ScaleFormatName,
    SchemeConfig,
    Settings,
)
from modewright.quantization.schemes import NO_SCHEME, SCHEMES, scheme

__all__ = [
    "ExportQuantizeConfig",
    "MaxCalibrateConfig",
    "QuantizeConfig",
    "QuantizerConfig",
    "QuantizerOverride",
    "Rule",
    "SchemeConfig",
]


def _known_scheme(name: str) -> str:
    scheme(name)
    return name


SchemeName = Annotated[str, AfterValidator(_known_scheme)]


class QuantizerOverride(Settings):
    """Fields of a quantizer that a rule changes; those left out stay as the scheme says."""

    enable: bool | None = Field(default=None, description="Switch the quantizer on or off.")
    format: FormatName | None = Field(default=None, description="What a number is.")
    num_bits: int | None = Field(default=None, ge=2, le=8, description="Width of a code: 2 to 8.")
    symmetric: bool | None = Field(default=None, description="Signed codes, or a zero point.")
    granularity: GranularityName | None = Field(default=None, description="What shares a scale.")
    group_size: int | None = Field(default=None, ge=1, description="Values that share a scale.")
    block_size: tuple[int, int] | None = Field(default=None, description="Size of a tile.")
    dynamic: bool | None = Field(default=None, description="Take the scale from each tensor.")
    scale_format: ScaleFormatName | None = Field(default=None, description="What a scale is.")

    def on(self, base: QuantizerConfig | None) -> QuantizerConfig | None:
        """Return the quantizer that ``base`` becomes; ``None`` is one that is off."""
        changes = {k: v for k, v in self.model_dump().items() if v is not None}
        enable = changes.pop("enable", None)
        if enable is False or (base is None and not changes and not enable):
            return None
        fields = base.model_dump() if base is not None else {}
        if "format" in changes:  # its width follows, unless it is given too
            fields.pop("num_bits", None)
        for sized, size in (("group", "group_size"), ("block", "block_size")):
            if size in changes and "granularity" not in changes:
                changes["granularity"] = sized
        for sized, size in (("group", "group_size"), ("block", "block_size")):
            if changes.get("granularity", sized) != sized:
                fields[size] = None
        return QuantizerConfig(**{**fields, **changes})


class Rule(Settings):
    """What is different for some modules; later rules win."""

    targets: tuple[str, ...] = Field(
        min_length=1, description="Patterns of module paths or class names that the rule is for."
    )
    ignore: tuple[str, ...] = Field(default=(), description="Patterns of exceptions from targets.")
    scheme: SchemeName | None = Field(
        default=None, description="Another scheme; 'none' for no quantization."
    )
    weights: QuantizerOverride | None = Field(default=None, description="Changes to the weights.")
    input_activations: QuantizerOverride | None = Field(
        default=None, description="Changes to the input activations."
    )
    output_activations: QuantizerOverride | None = Field(
        default=None, description="Changes to the output activations."
    )
    kv_cache: QuantizerOverride | None = Field(
        default=None, description="Changes to the keys and values of attention."
    )


class QuantizeConfig(ModeConfig):
    """Config of mode ``quantize``."""

    scheme: SchemeName = Field(
        default="w8a8",
        description=f"The scheme for all targets: {', '.join(SCHEMES)}, or {NO_SCHEME} to begin "
        "with nothing and let rules pick.",
    )
    targets: tuple[str, ...] | None = Field(
        default=None,
        description="Patterns of the modules to quantize; all linear and convolution layers if "
        "left out.",
    )
    ignore: tuple[str, ...] = Field(default=(), description="Patterns of modules to leave alone.")
    rules: tuple[Rule, ...] = Field(
        default=(), description="Exceptions, in order; later rules win over earlier ones."
    )
    on_unmatched: Literal["error", "report"] = Field(
        default="error",
        description="What to do about a pattern that matches no module: fail, or list it.",
    )


class MaxCalibrateConfig(ModeConfig):
    """Config of mode ``max_calibrate``."""

    require_data: bool = Field(
        default=True,
        description="Fail if a static activation quantizer saw no data; otherwise it stays dynamic "
        "and is listed.",
    )


class ExportQuantizeConfig(ModeConfig):
    """Config of mode ``export_quantize``: there is nothing to set."""
