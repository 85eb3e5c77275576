# SPDX-License-Identifier: Apache-2.0
"""The modes that prune widths, and the one that closes every search space of pruning.

Imports no torch, so that modes can be listed and explained without waiting for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeVar

from modewright.modes.descriptor import Metadata, ModeDescriptor
from modewright.modes.traits import Trait
from modewright.pruning.width.config import (
    AutonasConfig,
    ExportPruneConfig,
    FastnasConfig,
    GradnasConfig,
    WidthConfig,
)

if TYPE_CHECKING:
    from torch import nn

    from modewright.modes.searcher import BaseSearcher

C = TypeVar("C", bound=WidthConfig)


class WidthMode(ModeDescriptor[C]):
    """A mode that opens a space of subnets with smaller widths.

    Attributes:
        home: ``module:class`` of the searcher under ``pruning.width``.
    """

    technique = "pruning"
    export_mode = "export_prune"
    provides = frozenset({Trait.SEARCH_SPACE})
    forbids = frozenset(
        {Trait.SEARCH_SPACE, Trait.FAKE_QUANTIZED, Trait.PACKED, Trait.SPARSE, Trait.HAS_TEACHER}
    )
    writes_in_place = False
    home: ClassVar[str] = ""

    @property
    def search_algorithm(self) -> type[BaseSearcher]:
        """The searcher that chooses the widths."""
        from importlib import import_module

        module, _, name = self.home.partition(":")
        found: type[BaseSearcher] = getattr(
            import_module(f"modewright.pruning.width.{module}"), name
        )
        return found

    def convert(self, model: nn.Module, config: C) -> tuple[nn.Module, Metadata]:
        """Open the space; all of the network is chosen, so it computes what it did."""
        from modewright.pruning import space

        space.open_space(model)
        return model, space.chosen(model).to_data()

    def restore(self, model: nn.Module, config: C, metadata: Metadata) -> nn.Module:
        """Open the space, with the recorded choice."""
        from modewright.pruning import space

        space.open_space(model, space.SearchSpace.from_data(metadata))
        return model

    def update_for_new_mode(self, model: nn.Module, config: C, metadata: Metadata) -> None:
        """Write down what the search chose."""
        from modewright.pruning import space

        metadata.update(space.chosen(model).to_data())

    update_for_save = update_for_new_mode


class FastnasMode(WidthMode[FastnasConfig]):
    """Let widths be cut; a search scores each by itself and combines the best."""

    name = "fastnas"
    config_class = FastnasConfig
    home = "fastnas:FastnasSearcher"


class GradnasMode(WidthMode[GradnasConfig]):
    """Let widths be cut; a search takes the units that the loss feels least."""

    name = "gradnas"
    config_class = GradnasConfig
    home = "gradnas:GradnasSearcher"


class AutonasMode(WidthMode[AutonasConfig]):
    """Let widths be cut; subnets that share weights are trained, then bred by evolution."""

    name = "autonas"
    config_class = AutonasConfig
    home = "autonas:AutonasSearcher"
    writes_in_place = True


class ExportPruneMode(ModeDescriptor[ExportPruneConfig]):
    """Cut what was not chosen, for good; a plain smaller network is left."""

    name = "export_prune"
    technique = "pruning"
    config_class = ExportPruneConfig
    is_export_mode = True
    requires = frozenset({Trait.SEARCH_SPACE})
    removes = frozenset({Trait.SEARCH_SPACE})
    provides = frozenset({Trait.PRUNED})
    writes_in_place = False

    def convert(self, model: nn.Module, config: ExportPruneConfig) -> tuple[nn.Module, Metadata]:
        """Cut; the metadata holds the indices that stay."""
        from modewright.pruning import export

        return model, export.convert(model)

    def restore(self, model: nn.Module, config: ExportPruneConfig, metadata: Metadata) -> nn.Module:
        """Cut what the record says."""
        from modewright.pruning import export

        export.restore(model, metadata)
        return model
