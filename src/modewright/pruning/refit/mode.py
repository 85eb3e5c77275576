# SPDX-License-Identifier: Apache-2.0
"""Mode ``refit``: its config and descriptor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modewright.modes.config import ModeConfig
from modewright.modes.descriptor import Metadata, ModeDescriptor
from modewright.modes.traits import Trait

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from modewright.calibration.forward import OnBatch


class RefitConfig(ModeConfig):
    """Config of mode ``refit``: there is nothing to set."""


class RefitMode(ModeDescriptor[RefitConfig]):
    """Solve what writes to the residual stream anew, so that pruning changes the stream least."""

    name = "refit"
    technique = "pruning"
    config_class = RefitConfig
    requires = frozenset({Trait.SEARCH_SPACE})
    uses_calibration = True
    writes_in_place = False

    def convert(
        self,
        model: nn.Module,
        config: RefitConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Refit the chosen subnet of an open search space to the whole network.

        Args:
            model: A model whose search space is open, with a subnet chosen.
            config: The config.
            calibration: Batches, or a function that runs the model.
            on_batch: Called after each block with how many are done, and how many there are.
            checkpoint: Not used; accepted so that one ``mode_kwargs`` fits all.

        Returns:
            The model, and metadata with the errors before and after by block and layer.
        """
        from modewright.pruning.refit import walk

        return model, walk.refit(model, calibration, on_batch=on_batch)

    def restore(self, model: nn.Module, config: RefitConfig, metadata: Metadata) -> nn.Module:
        """Do nothing: only values changed, and those are loaded."""
        return model
