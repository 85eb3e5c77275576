# SPDX-License-Identifier: Apache-2.0
"""The quantization modes: names, configs, rules of order. What they do is elsewhere.

Imports no torch, so that modes can be listed and explained without waiting for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, TypeVar

from modewright.modes.config import ModeConfig
from modewright.modes.descriptor import Metadata, ModeDescriptor
from modewright.modes.traits import Trait
from modewright.quantization.config import (
    AwqConfig,
    BiasCorrectionConfig,
    CompressConfig,
    DecompressConfig,
    EntropyConfig,
    ExportQuantizeConfig,
    GptqConfig,
    HadamardConfig,
    HqqConfig,
    LearnedRoundingConfig,
    LsqConfig,
    MaxCalibrateConfig,
    MseConfig,
    PercentileConfig,
    QuantizeConfig,
    RotateConfig,
    SmoothquantConfig,
    SvdquantConfig,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from modewright.calibration.forward import OnBatch


ROTATES = "a rotation mixes weights, so that those that are zero no longer are"
LEAVES_DENSE = "what a branch of low rank leaves of a sparse weight is dense"


class RotateMode(ModeDescriptor[RotateConfig]):
    """Rotate the residual stream of a transformer, so that no channel stands out."""

    name = "rotate"
    technique = "quantization"
    config_class = RotateConfig
    forbids = frozenset({Trait.FAKE_QUANTIZED, Trait.PACKED, Trait.SPARSE})
    reasons: ClassVar[dict[str, str]] = {Trait.SPARSE: ROTATES}
    uses_calibration = True
    writes_in_place = False

    def convert(
        self,
        model: nn.Module,
        config: RotateConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Rotate; the metadata lists what reads and writes the stream, and what was untied.

        Args:
            model: The model.
            config: The config.
            calibration: Batches, or a function that runs the model: the first batch shows whether
                the model computes what it did.
            on_batch: Called when it is done.
            checkpoint: Not needed; accepted so that one ``mode_kwargs`` fits all.
        """
        from modewright.quantization.passes import rotate

        return rotate.convert(model, config, calibration=calibration, on_batch=on_batch)

    def restore(self, model: nn.Module, config: RotateConfig, metadata: Metadata) -> nn.Module:
        """Untie what was untied."""
        from modewright.quantization.passes import rotate

        return rotate.restore(model, metadata)


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
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Insert quantizers; the metadata holds the scheme of every layer and what was skipped.

        Keywords are not needed yet; they are accepted so that one ``mode_kwargs`` fits all.
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


C = TypeVar("C", bound=ModeConfig)


class CalibratingMode(ModeDescriptor[C]):
    """A mode that sets scales, codes or transforms of a quantized model, mostly from data.

    Attributes:
        home: ``module:function`` under ``quantization.passes`` that does it.
    """

    technique = "quantization"
    requires = frozenset({Trait.FAKE_QUANTIZED})
    provides = frozenset({Trait.CALIBRATED})
    uses_calibration = True
    writes_in_place = False
    home: ClassVar[str]

    def convert(
        self,
        model: nn.Module,
        config: C,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Calibrate.

        Args:
            model: The model with quantizers.
            config: The config.
            calibration: Batches, or a function that runs the model.
            on_batch: Called with how much is done, and how much there is.
            checkpoint: A folder in which finished blocks are kept, if the mode :attr:`resumes`:
                the same conversion of the same model goes on after the last of them. Batches can
                be recognised; with a function everything is done again.
        """
        module, _, function = self.home.partition(":")
        run = getattr(import_module(f"modewright.quantization.passes.{module}"), function)
        kept = {"checkpoint": checkpoint} if self.resumes else {}
        result: tuple[nn.Module, Metadata] = run(
            model, config, calibration=calibration, on_batch=on_batch, **kept
        )
        return result

    def restore(self, model: nn.Module, config: C, metadata: Metadata) -> nn.Module:
        """Make room for the recorded scales, codes and transforms."""
        from modewright.quantization.passes.records import restore_buffers

        return restore_buffers(model, metadata)


class MaxCalibrateMode(CalibratingMode[MaxCalibrateConfig]):
    """Set the scales of all quantizers from the largest magnitudes seen."""

    name = "max_calibrate"
    config_class = MaxCalibrateConfig
    home = "ranges:max_calibrate"


class PercentileMode(CalibratingMode[PercentileConfig]):
    """Set the scales of activations so that the outermost values saturate."""

    name = "percentile"
    config_class = PercentileConfig
    home = "ranges:percentile"


class EntropyMode(CalibratingMode[EntropyConfig]):
    """Set the scales of activations that keep their distribution closest."""

    name = "entropy"
    config_class = EntropyConfig
    home = "ranges:entropy"


class MseMode(CalibratingMode[MseConfig]):
    """Search the scales with the least squared error, weighted by the inputs."""

    name = "mse"
    config_class = MseConfig
    home = "ranges:mse"


class HqqMode(CalibratingMode[HqqConfig]):
    """Search the scales of weights without data (half-quadratic quantization)."""

    name = "hqq"
    config_class = HqqConfig
    home = "ranges:hqq"


class SmoothquantMode(CalibratingMode[SmoothquantConfig]):
    """Divide inputs with outliers, and let the weights take their range over."""

    name = "smoothquant"
    config_class = SmoothquantConfig
    home = "smoothing:smoothquant"


class AwqMode(CalibratingMode[AwqConfig]):
    """Enlarge the columns of weights that see large inputs, so that rounding costs less."""

    name = "awq"
    config_class = AwqConfig
    home = "smoothing:awq"


class HadamardMode(CalibratingMode[HadamardConfig]):
    """Rotate the inputs of layers in blocks when they run, so that outliers spread out."""

    name = "hadamard"
    config_class = HadamardConfig
    home = "hadamard:convert"
    forbids = frozenset({Trait.SPARSE})
    reasons: ClassVar[dict[str, str]] = {Trait.SPARSE: ROTATES}
    uses_calibration = False


class SvdquantMode(CalibratingMode[SvdquantConfig]):
    """Put a branch of low rank in full precision beside every quantized weight."""

    name = "svdquant"
    config_class = SvdquantConfig
    home = "svdquant:convert"
    forbids = frozenset({Trait.SPARSE})
    reasons: ClassVar[dict[str, str]] = {Trait.SPARSE: LEAVES_DENSE}


class BiasCorrectionMode(CalibratingMode[BiasCorrectionConfig]):
    """Take the mean error of every layer's output into its bias."""

    name = "bias_correction"
    config_class = BiasCorrectionConfig
    home = "bias_correction:convert"


class GptqMode(CalibratingMode[GptqConfig]):
    """Round weights one column after another; later ones make up for the error."""

    name = "gptq"
    config_class = GptqConfig
    home = "gptq:convert"
    resumes = True


class LearnedRoundingMode(CalibratingMode[LearnedRoundingConfig]):
    """Learn the rounding and clipping of weights, block by block."""

    name = "learned_rounding"
    config_class = LearnedRoundingConfig
    home = "learned_rounding:convert"
    resumes = True


class LsqMode(CalibratingMode[LsqConfig]):
    """Learn all scales together from the original model's predictions."""

    name = "lsq"
    config_class = LsqConfig
    home = "lsq:convert"


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
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Fold; the metadata lists the layers, and those whose activations are plain again.

        Keywords are not needed; they are accepted so that one ``mode_kwargs`` fits all.
        """
        from modewright.quantization import convert

        return convert.export_quantize(model)

    def restore(
        self, model: nn.Module, config: ExportQuantizeConfig, metadata: Metadata
    ) -> nn.Module:
        """Remove the recorded layers' quantizers."""
        from modewright.quantization import convert

        return convert.restore_export(model, metadata)


class CompressMode(ModeDescriptor[CompressConfig]):
    """Store quantized weights in as many bits as they have, and run them like that."""

    name = "compress"
    technique = "quantization"
    config_class = CompressConfig
    is_export_mode = True
    closes = frozenset({"quantize", "auto_quantize"})
    export_mode = "decompress"
    requires = frozenset({Trait.FAKE_QUANTIZED})
    removes = frozenset({Trait.FAKE_QUANTIZED, Trait.CALIBRATED, Trait.SPARSE})
    provides = frozenset({Trait.PACKED})
    writes_in_place = False

    def convert(
        self,
        model: nn.Module,
        config: CompressConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Pack; the metadata describes every packed layer, and says what stays as it is and why.

        Keywords are not needed; they are accepted so that one ``mode_kwargs`` fits all.
        """
        from modewright.quantization import packing

        return packing.compress(model, config)

    def restore(self, model: nn.Module, config: CompressConfig, metadata: Metadata) -> nn.Module:
        """Make room for the packed tensors."""
        from modewright.quantization import packing

        return packing.restore_compress(model, metadata)


class DecompressMode(ModeDescriptor[DecompressConfig]):
    """Unpack the weights into plain layers that any program knows."""

    name = "decompress"
    technique = "quantization"
    config_class = DecompressConfig
    is_export_mode = True
    requires = frozenset({Trait.PACKED})
    removes = frozenset({Trait.PACKED})
    writes_in_place = False

    def convert(
        self,
        model: nn.Module,
        config: DecompressConfig,
        *,
        calibration: object = None,
        on_batch: OnBatch | None = None,
        checkpoint: str | Path | None = None,
    ) -> tuple[nn.Module, Metadata]:
        """Unpack; the metadata lists the layers, and those whose activations are plain again.

        Keywords are not needed; they are accepted so that one ``mode_kwargs`` fits all.
        """
        from modewright.quantization import unpacking

        return unpacking.decompress(model)

    def restore(self, model: nn.Module, config: DecompressConfig, metadata: Metadata) -> nn.Module:
        """Give the recorded layers their own class back."""
        from modewright.quantization import unpacking

        return unpacking.restore_decompress(model, metadata)
