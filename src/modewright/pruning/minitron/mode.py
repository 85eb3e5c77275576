# SPDX-License-Identifier: Apache-2.0
"""Mode ``minitron``: its config, and what it does to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from modewright.modes.descriptor import Metadata, ModeDescriptor
from modewright.modes.traits import Trait
from modewright.pruning.width.config import Kind, WidthConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from modewright.calibration.forward import OnBatch
    from modewright.modes.searcher import BaseSearcher


class MinitronConfig(WidthConfig):
    """Config of mode ``minitron``."""

    kinds: list[Kind] = Field(
        default=["heads", "ffn"],
        description="The kinds of dimensions that may be cut, each by as much in every block.",
    )
    divisor: int = Field(
        default=32, ge=1, description="Inner and hidden widths stay multiples of this."
    )
    min_share: float = Field(
        default=0.25, gt=0, le=1, description="The least part of its units that a dimension keeps."
    )
    depth: bool = Field(default=True, description="Whether whole blocks may be dropped too.")
    max_depth_share: float = Field(
        default=0.5, ge=0, lt=1, description="The largest part of the blocks that may be dropped."
    )


class MinitronMode(ModeDescriptor[MinitronConfig]):
    """Let heads, inner widths and blocks be cut, alike in all blocks; a search balances them."""

    name = "minitron"
    technique = "pruning"
    config_class = MinitronConfig
    export_mode = "export_prune"
    provides = frozenset({Trait.SEARCH_SPACE})
    forbids = frozenset(
        {Trait.SEARCH_SPACE, Trait.FAKE_QUANTIZED, Trait.PACKED, Trait.SPARSE, Trait.HAS_TEACHER}
    )
    writes_in_place = False

    @property
    def search_algorithm(self) -> type[BaseSearcher]:
        """The searcher that chooses widths and blocks."""
        from modewright.pruning.minitron.searcher import MinitronSearcher

        return MinitronSearcher

    def convert(
        self,
        model: nn.Module,
        config: MinitronConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Open the space; all of the network is chosen, so it computes what it did.

        Keywords are not needed; they are accepted so that one ``mode_kwargs`` fits all.
        """
        from modewright.pruning import space
        from modewright.pruning.depth import blocks

        parts = dict.fromkeys(blocks.removable_blocks(model)[0], 0) if config.depth else {}
        blocks.make_skippable(model, parts)
        space.open_space(model)
        return model, _now(model)

    def restore(self, model: nn.Module, config: MinitronConfig, metadata: Metadata) -> nn.Module:
        """Open the space, with the recorded choice."""
        from modewright.pruning import space
        from modewright.pruning.depth import blocks

        blocks.make_skippable(model, metadata["blocks"])
        blocks.skip_blocks(model, metadata["dropped"])
        space.open_space(model, space.SearchSpace.from_data(metadata))
        return model

    def update_for_new_mode(
        self, model: nn.Module, config: MinitronConfig, metadata: Metadata
    ) -> None:
        """Write down what the search chose."""
        metadata.update(_now(model))

    update_for_save = update_for_new_mode


def _now(model: nn.Module) -> dict[str, Any]:
    """Return what is open and what is chosen."""
    from modewright.pruning import space
    from modewright.pruning.depth import blocks

    parts = {path: block.parts for path, block in blocks.skippable_blocks(model).items()}
    dropped = blocks.skipped_blocks(model)
    return {**space.chosen(model).to_data(), "blocks": parts, "dropped": dropped}
