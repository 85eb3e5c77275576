# SPDX-License-Identifier: Apache-2.0
"""Configs of the modes that prune widths. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modewright.modes.config import ModeConfig

Kind = Literal["channels", "heads", "ffn", "hidden", "experts"]


class WidthConfig(ModeConfig):
    """Which dimensions of a network may be cut, and how far."""

    targets: list[str] = Field(
        default=["*"], description="Patterns of the groups that may be cut, by the first module."
    )
    ignore: list[str] = Field(default=[], description="Patterns of groups that stay whole.")
    kinds: list[Kind] = Field(
        default=["channels", "heads", "ffn", "hidden", "experts"],
        description="The kinds of dimensions that may be cut.",
    )
    divisor: int = Field(
        default=8,
        ge=1,
        description="Channels, inner and hidden widths stay multiples of this.",
    )
    min_share: float = Field(
        default=0.1, gt=0, le=1, description="The least part of its units that a group keeps."
    )


class FastnasConfig(WidthConfig):
    """Config of mode ``fastnas``."""


class GradnasConfig(WidthConfig):
    """Config of mode ``gradnas``."""


class AutonasConfig(WidthConfig):
    """Config of mode ``autonas``."""


class ExportPruneConfig(ModeConfig):
    """Config of mode ``export_prune``: there is nothing to set."""
