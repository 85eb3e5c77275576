# SPDX-License-Identifier: Apache-2.0
"""The sparsity modes: names, configs, rules of order. What they do is elsewhere.

Imports no torch, so that modes can be listed and explained without waiting for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, TypeVar

from modewright.modes.descriptor import Metadata, ModeDescriptor
from modewright.modes.traits import Trait
from modewright.sparsity.config import (
    AlpsConfig,
    ExportSparseConfig,
    SparseConfig,
    SparsegptConfig,
    SparseMagnitudeConfig,
    WandaConfig,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from modewright.calibration.forward import OnBatch

C = TypeVar("C", bound=SparseConfig)


class SparseMode(ModeDescriptor[C]):
    """A mode that puts masks on layers.

    Attributes:
        needs_rows: Whether it has to see the rows that a weight multiplies.
    """

    technique = "sparsity"
    export_mode = "export_sparse"
    provides = frozenset({Trait.SPARSE})
    forbids = frozenset({Trait.SPARSE, Trait.FAKE_QUANTIZED, Trait.PACKED})
    reasons: ClassVar[dict[str, str]] = {
        Trait.SPARSE: "its zeros would not be kept by other masks",
        Trait.FAKE_QUANTIZED: "scales and codes are chosen for the weights that there are: make "
        "the model sparse first, quantizers keep the zeros",
        Trait.PACKED: "packed weights cannot be changed",
    }
    writes_in_place = False
    needs_rows: ClassVar[bool] = False

    def restore(self, model: nn.Module, config: C, metadata: Metadata) -> nn.Module:
        """Make room for the recorded masks."""
        from modewright.sparsity.passes import records

        return records.restore(model, metadata)

    def preview(self, model: nn.Module, config: C) -> list[str]:
        """Say which layers get which pattern, and what is skipped."""
        from modewright.sparsity.planning import plan_layers

        return plan_layers(model, config, mode=self.name, needs_rows=self.needs_rows).lines()


class SparseMagnitudeMode(SparseMode[SparseMagnitudeConfig]):
    """Make the smallest weights zero, in a pattern; no data is needed."""

    name = "sparse_magnitude"
    config_class = SparseMagnitudeConfig

    def convert(
        self,
        model: nn.Module,
        config: SparseMagnitudeConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Put masks on; the metadata holds the sparsity of every layer and what was skipped.

        Keywords are not needed; they are accepted so that one ``mode_kwargs`` fits all.
        """
        from modewright.sparsity.passes import magnitude

        return magnitude.convert(model, config)


class CalibratedSparseMode(SparseMode[C]):
    """A mode that chooses masks, and perhaps weights, from data.

    Attributes:
        function: Its name in ``sparsity.passes.prune``.
    """

    uses_calibration = True
    resumes = True
    needs_rows = True
    function: ClassVar[str]

    def convert(
        self,
        model: nn.Module,
        config: C,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Put masks on; the metadata holds sparsity and error of every layer, and what is dense.

        Args:
            model: The model.
            config: The config.
            calibration: Batches, or a function that runs the model (not with ``epochs``).
            on_batch: Called with how much is done, and how much there is.
            checkpoint: A folder in which finished blocks are kept: the same conversion of the same
                model goes on after the last of them. Epochs begin anew.
        """
        run = getattr(import_module("modewright.sparsity.passes.prune"), self.function)
        result: tuple[nn.Module, Metadata] = run(
            model, config, calibration=calibration, on_batch=on_batch, checkpoint=checkpoint
        )
        return result


class WandaMode(CalibratedSparseMode[WandaConfig]):
    """Make the weights zero that matter least for the inputs that they see."""

    name = "wanda"
    config_class = WandaConfig
    function = "wanda"


class SparsegptMode(CalibratedSparseMode[SparsegptConfig]):
    """Make weights zero one column after another; later ones make up for what is lost."""

    name = "sparsegpt"
    config_class = SparsegptConfig
    function = "sparsegpt_pass"


class AlpsMode(CalibratedSparseMode[AlpsConfig]):
    """Choose which weights are zero and what the others are together (ADMM)."""

    name = "alps"
    config_class = AlpsConfig
    function = "alps_pass"


class ExportSparseMode(ModeDescriptor[ExportSparseConfig]):
    """Fold masks into plain layers, whose zeros are then ordinary numbers."""

    name = "export_sparse"
    technique = "sparsity"
    config_class = ExportSparseConfig
    is_export_mode = True
    requires = frozenset({Trait.SPARSE})
    removes = frozenset({Trait.SPARSE})
    writes_in_place = False

    def convert(
        self,
        model: nn.Module,
        config: ExportSparseConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Fold; the metadata lists the layers.

        Keywords are not needed; they are accepted so that one ``mode_kwargs`` fits all.
        """
        from modewright.sparsity.passes import records

        return records.export(model)

    def restore(
        self, model: nn.Module, config: ExportSparseConfig, metadata: Metadata
    ) -> nn.Module:
        """Give the recorded layers their own class back."""
        from modewright.sparsity.passes import records

        return records.restore_export(model, metadata)
