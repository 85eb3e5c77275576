# SPDX-License-Identifier: Apache-2.0
"""Mode ``auto_quantize``: its name, config and rules of order. What it does is elsewhere.

Imports no torch, so that modes can be listed and explained without waiting for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modewright.errors import SearchError
from modewright.mixed_precision.config import AutoQuantizeConfig
from modewright.modes.descriptor import Metadata, ModeDescriptor
from modewright.modes.traits import Trait

if TYPE_CHECKING:
    from torch import nn

    from modewright.modes.searcher import BaseSearcher


class AutoQuantizeMode(ModeDescriptor[AutoQuantizeConfig]):
    """Search a scheme for every group of layers, within budgets of bits, bytes or seconds."""

    name = "auto_quantize"
    technique = "mixed_precision"
    config_class = AutoQuantizeConfig
    export_mode = "export_quantize"
    provides = frozenset({Trait.FAKE_QUANTIZED})
    forbids = frozenset({Trait.FAKE_QUANTIZED, Trait.PACKED, Trait.SEARCH_SPACE})
    writes_in_place = False

    @property
    def search_algorithm(self) -> type[BaseSearcher]:
        """Scores and solves; then puts the quantizers in."""
        from modewright.mixed_precision.searcher import AutoQuantizeSearcher

        return AutoQuantizeSearcher

    def convert(self, model: nn.Module, config: AutoQuantizeConfig) -> tuple[nn.Module, Metadata]:
        """Open the search space; the model computes what it did until a search has chosen."""
        from modewright.mixed_precision.space import open_space

        return model, open_space(model, config).metadata(model)

    def restore(
        self, model: nn.Module, config: AutoQuantizeConfig, metadata: Metadata
    ) -> nn.Module:
        """Put the recorded quantizers in."""
        from modewright.mixed_precision import space

        return space.restore(model, metadata)

    def update_for_save(
        self, model: nn.Module, config: AutoQuantizeConfig, metadata: Metadata
    ) -> None:
        """Record what was chosen."""
        from modewright.mixed_precision.space import space_of

        metadata.update(space_of(model).metadata(model))

    def update_for_new_mode(
        self, model: nn.Module, config: AutoQuantizeConfig, metadata: Metadata
    ) -> None:
        """Record what was chosen.

        Raises:
            SearchError: Nothing was: the space was not searched.
        """
        self.update_for_save(model, config, metadata)
        if not metadata["chosen"]:
            raise SearchError(
                "The search space of mode 'auto_quantize' was opened but not searched: call "
                "modewright.search(model, 'auto_quantize', {'effective_bits': 4.5}, "
                "calibration=batches), or give the step of the recipe a `search:`."
            )

    def preview(self, model: nn.Module, config: AutoQuantizeConfig) -> list[str]:
        """Say which layers are chosen for, and what is skipped."""
        from modewright.mixed_precision.space import quantize_config
        from modewright.quantization.planning import plan_layers

        plan = plan_layers(model, quantize_config(config))
        skipped = [line for line in plan.lines() if line.startswith("skips ")]
        candidates = ", ".join(config.candidates)
        return [f"{len(plan.schemes)} layers, each to get one of {candidates}", *skipped]
