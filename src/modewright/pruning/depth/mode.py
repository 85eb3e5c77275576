# SPDX-License-Identifier: Apache-2.0
"""Mode ``depth``: its config, and what it does to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from modewright.modes.config import ModeConfig
from modewright.modes.descriptor import Metadata, ModeDescriptor
from modewright.modes.traits import Trait

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from modewright.calibration.forward import OnBatch
    from modewright.modes.searcher import BaseSearcher


class DepthConfig(ModeConfig):
    """Config of mode ``depth``."""

    targets: list[str] = Field(
        default=["*"], description="Patterns of the repeated blocks that may be dropped."
    )
    ignore: list[str] = Field(default=[], description="Patterns of blocks that always stay.")


class DepthMode(ModeDescriptor[DepthConfig]):
    """Let whole blocks be dropped; a search picks those whose loss matters least."""

    name = "depth"
    technique = "pruning"
    config_class = DepthConfig
    export_mode = "export_prune"
    provides = frozenset({Trait.SEARCH_SPACE})
    forbids = frozenset({Trait.SEARCH_SPACE, Trait.FAKE_QUANTIZED, Trait.PACKED, Trait.HAS_TEACHER})
    writes_in_place = False

    @property
    def search_algorithm(self) -> type[BaseSearcher]:
        """The searcher that measures what each block's loss does."""
        from modewright.pruning.depth.searcher import DepthSearcher

        return DepthSearcher

    def convert(
        self,
        model: nn.Module,
        config: DepthConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Make blocks skippable; the metadata lists them, and why others are not.

        Keywords are not needed; they are accepted so that one ``mode_kwargs`` fits all.

        Raises:
            MatchError: A pattern matches no block, or no block is left.
        """
        from modewright.pruning.depth import blocks

        parts, skipped = blocks.choose_blocks(model, config.targets, config.ignore)
        blocks.make_skippable(model, parts)
        return model, {**_now(model), "skipped": skipped}

    def restore(self, model: nn.Module, config: DepthConfig, metadata: Metadata) -> nn.Module:
        """Make the recorded blocks skippable, and skip those that were chosen."""
        from modewright.pruning.depth import blocks

        blocks.make_skippable(model, metadata["blocks"])
        blocks.skip_blocks(model, metadata["dropped"])
        return model

    def update_for_new_mode(
        self, model: nn.Module, config: DepthConfig, metadata: Metadata
    ) -> None:
        """Write down what the search chose."""
        metadata.update(_now(model))

    update_for_save = update_for_new_mode

    def preview(self, model: nn.Module, config: DepthConfig) -> list[str]:
        """Say how many blocks may be dropped, and why others may not."""
        from modewright.pruning.depth import blocks

        parts, skipped = blocks.choose_blocks(model, config.targets, config.ignore)
        lines = [f"{len(parts)} blocks may be dropped: {', '.join(parts)}"]
        return lines + [f"{item['module']} stays: {item['reason']}" for item in skipped]


def _now(model: nn.Module) -> dict[str, Any]:
    """Return what can be skipped and what is."""
    from modewright.pruning.depth import blocks

    parts = {path: block.parts for path, block in blocks.skippable_blocks(model).items()}
    return {"blocks": parts, "dropped": blocks.skipped_blocks(model)}
