# SPDX-License-Identifier: Apache-2.0
"""The quantization modes: names, configs, rules of order. What they do is in ``convert``.

Imports no torch, so that modes can be listed and explained without waiting for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modewright.modes.descriptor import Metadata, ModeDescriptor
from modewright.modes.traits import Trait
from modewright.quantization.config import (
    ExportQuantizeConfig,
    MaxCalibrateConfig,
    QuantizeConfig,
)

if TYPE_CHECKING:
    from torch import nn

    from modewright.calibration.forward import OnBatch


class QuantizeMode(ModeDescriptor[QuantizeConfig]):
    """Put quantizers on the layers that rules pick: low precision, simulated."""

    name = "quantize"
    technique = "quantization"
    config_class = QuantizeConfig
    export_mode = "export_quantize"
    provides = frozenset({Trait.FAKE_QUANTIZED})
    forbids = frozenset({Trait.FAKE_QUANTIZED, Trait.PACKED})
    writes_in_place = False

    def convert(
        self,
        model: nn.Module,
        config: QuantizeConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Insert quantizers; the metadata holds the scheme of every layer and what was skipped.

        Calibration data is not needed yet; it is accepted so that one ``mode_kwargs`` fits all.
        """
        from modewright.quantization import convert

        return convert.quantize(model, config)

    def restore(self, model: nn.Module, config: QuantizeConfig, metadata: Metadata) -> nn.Module:
        """Insert the recorded quantizers."""
        from modewright.quantization import convert

        return convert.restore_quantize(model, metadata)

    def preview(self, model: nn.Module, config: QuantizeConfig) -> list[str]:
        """Say which layers get which scheme, and what is skipped."""
        from modewright.quantization.planning import plan_layers

        return plan_layers(model, config).lines()


class MaxCalibrateMode(ModeDescriptor[MaxCalibrateConfig]):
    """Set the scales of all quantizers from the largest magnitudes seen."""

    name = "max_calibrate"
    technique = "quantization"
    config_class = MaxCalibrateConfig
    requires = frozenset({Trait.FAKE_QUANTIZED})
    provides = frozenset({Trait.CALIBRATED})
    uses_calibration = True
    writes_in_place = False

    def convert(
        self,
        model: nn.Module,
        config: MaxCalibrateConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Calibrate.

        Args:
            model: The model with quantizers.
            config: The config.
            calibration: Batches, or a function that runs the model; static activations need it.
            on_batch: Called after each batch with its number and the number of all.
        """
        from modewright.quantization import calibrate

        return calibrate.max_calibrate(model, config, calibration=calibration, on_batch=on_batch)

    def restore(
        self, model: nn.Module, config: MaxCalibrateConfig, metadata: Metadata
    ) -> nn.Module:
        """Make room for the recorded scales."""
        from modewright.quantization import calibrate

        return calibrate.restore_scales(model, metadata)


class ExportQuantizeMode(ModeDescriptor[ExportQuantizeConfig]):
    """Fold the quantized weights into plain layers and remove the quantizers."""

    name = "export_quantize"
    technique = "quantization"
    config_class = ExportQuantizeConfig
    is_export_mode = True
    requires = frozenset({Trait.FAKE_QUANTIZED})
    removes = frozenset({Trait.FAKE_QUANTIZED, Trait.CALIBRATED})
    writes_in_place = False

    def convert(
        self,
        model: nn.Module,
        config: ExportQuantizeConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Fold; the metadata lists the layers, and those whose activations are plain again.

        Calibration data is not needed; it is accepted so that one ``mode_kwargs`` fits all.
        """
        from modewright.quantization import convert

        return convert.export_quantize(model)

    def restore(
        self, model: nn.Module, config: ExportQuantizeConfig, metadata: Metadata
    ) -> nn.Module:
        """Remove the recorded layers' quantizers."""
        from modewright.quantization import convert

        return convert.restore_export(model, metadata)
