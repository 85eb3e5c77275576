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
    ScaleRuleName,
    SchemeConfig,
    Settings,
)
from modewright.quantization.schemes import NO_SCHEME, SCHEMES, scheme

__all__ = [
    "AwqConfig",
    "CompressConfig",
    "DecompressConfig",
    "EntropyConfig",
    "ExportQuantizeConfig",
    "GptqConfig",
    "HqqConfig",
    "LearnedRoundingConfig",
    "LsqConfig",
    "MaxCalibrateConfig",
    "MseConfig",
    "PercentileConfig",
    "QuantizeConfig",
    "QuantizerConfig",
    "QuantizerOverride",
    "RangeConfig",
    "Rule",
    "SchemeConfig",
    "SmoothquantConfig",
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
    scale_rule: ScaleRuleName | None = Field(
        default=None, description="How a scale follows from the values it is for."
    )

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
        description="Patterns of the modules to quantize; every kind of layer that can be, but "
        "embeddings, if left out.",
    )
    ignore: tuple[str, ...] = Field(default=(), description="Patterns of modules to leave alone.")
    rules: tuple[Rule, ...] = Field(
        default=(), description="Exceptions, in order; later rules win over earlier ones."
    )
    on_unmatched: Literal["error", "report"] = Field(
        default="error",
        description="What to do about a pattern that matches no module: fail, or list it.",
    )


class RangeConfig(ModeConfig):
    """What all modes have that choose scales from what was seen."""

    require_data: bool = Field(
        default=True,
        description="Fail if a static activation quantizer saw no data; otherwise it stays dynamic "
        "and is listed.",
    )


class MaxCalibrateConfig(RangeConfig):
    """Config of mode ``max_calibrate``."""


class PercentileConfig(RangeConfig):
    """Config of mode ``percentile``."""

    percentile: float = Field(
        default=99.99, gt=0, le=100, description="How many percent of all values are in range."
    )


class EntropyConfig(RangeConfig):
    """Config of mode ``entropy``."""


class MseConfig(RangeConfig):
    """Config of mode ``mse``."""

    importance: bool = Field(
        default=True,
        description="With calibration data, count the error of a weight by the mean square of the "
        "input that it multiplies.",
    )
    max_row_norm: float | None = Field(
        default=1.0,
        gt=0,
        description="How many times the median length an input may count; longer ones are scaled "
        "down. Left out: no limit.",
    )


class HqqConfig(RangeConfig):
    """Config of mode ``hqq``."""


class SmoothquantConfig(ModeConfig):
    """Config of mode ``smoothquant``."""

    alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="How much of the difficulty moves from inputs to weights; the best of `alphas` "
        "for each layer if left out.",
    )
    alphas: tuple[float, ...] = Field(
        default=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), description="What is tried."
    )
    fold: bool = Field(
        default=True,
        description="Put the division into the module that makes the input, where there is one.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Of matrix products while the network is run; 'auto' takes bfloat16 where it "
        "is faster, if no weight has more than four bits.",
    )


class AwqConfig(ModeConfig):
    """Config of mode ``awq``."""

    steps: int = Field(default=10, ge=1, description="How many ratios are tried, from 0 to 1.")
    fold: bool = Field(
        default=True,
        description="Put the division into the module that makes the input, where there is one.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Of matrix products while the network is run; 'auto' takes bfloat16 where it "
        "is faster, if no weight has more than four bits.",
    )


class GptqConfig(ModeConfig):
    """Config of mode ``gptq``."""

    damping: float = Field(
        default=0.01, gt=0, description="Added to the Hessian's diagonal, as a part of its mean."
    )
    activation_order: bool = Field(
        default=True, description="Round the columns with the largest inputs first."
    )
    search_scale: bool = Field(
        default=True,
        description="Search the scales with the least error, weighted by the inputs; otherwise "
        "max scales.",
    )
    correct_inputs: bool = Field(
        default=False,
        description="Approximate what the original network puts out on its own inputs, which makes "
        "up for the error of earlier layers. It needs much data of the kind that comes later.",
    )
    correction_damping: float = Field(
        default=0.5, gt=0, description="How strongly that correction is held back."
    )
    exact_inputs: bool = Field(
        default=False,
        description="Look at inputs before they are quantized, here and in earlier layers: what "
        "quantizing them adds is noise, which weights that make up for it fit.",
    )
    max_row_norm: float | None = Field(
        default=1.0,
        gt=0,
        description="How many times the median length an input may count; longer ones are scaled "
        "down. Left out: no limit.",
    )
    min_tokens: int = Field(
        default=32, ge=1, description="Fewer inputs than this do not make a layer's Hessian."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Of matrix products while the network is run; 'auto' takes bfloat16 where it "
        "is faster, if no weight has more than four bits.",
    )


class RotateConfig(ModeConfig):
    """Config of mode ``rotate``."""

    rotation: Literal["hadamard", "orthogonal"] = Field(
        default="hadamard",
        description="A Hadamard matrix with random signs, or a random orthogonal matrix.",
    )
    seed: int = Field(default=0, description="Of the rotation.")


class HadamardConfig(ModeConfig):
    """Config of mode ``hadamard``."""

    size: int | None = Field(
        default=None,
        ge=2,
        description="Features that are rotated together; the size of a group if left out, or else "
        "the largest power of two up to 128 that divides the features.",
    )
    weights_too: bool = Field(
        default=False, description="Rotate layers too whose inputs are not quantized."
    )
    targets: tuple[str, ...] | None = Field(
        default=None, description="Patterns of the layers to rotate; all if left out."
    )
    ignore: tuple[str, ...] = Field(default=(), description="Patterns of layers to leave alone.")


class SvdquantConfig(ModeConfig):
    """Config of mode ``svdquant``."""

    rank: int = Field(default=32, ge=1, description="Inner size of the branch.")
    iterations: int = Field(
        default=4, ge=0, description="How often branch and quantized rest are fitted in turn."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Of matrix products while the network is run; 'auto' takes bfloat16 where it "
        "is faster, if no weight has more than four bits.",
    )


class BiasCorrectionConfig(ModeConfig):
    """Config of mode ``bias_correction``: there is nothing to set."""


class LearnedRoundingConfig(ModeConfig):
    """Config of mode ``learned_rounding``."""

    iterations: int = Field(default=200, ge=1, description="Steps for each block.")
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Batches of calibration data in a step; as many as make about a thousand "
        "tokens if left out.",
    )
    rate: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of rounding offsets, in steps of the grid; 1 / iterations if "
        "left out, twice that for 'adam'. It falls to zero.",
    )
    scale_rate: float | None = Field(
        default=None, gt=0, description="Learning rate of scales; `rate` if left out."
    )
    optimizer: Literal["sign", "adam"] = Field(
        default="sign",
        description="Move by the sign of the gradient, or as Adam does, which is better at 2 bits.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Of matrix products; 'auto' takes bfloat16 where it is faster."
    )
    probe: int = Field(
        default=8,
        ge=1,
        description="Batches on which a block is measured before and after; what was learned is "
        "dropped if it is no better there.",
    )
    seed: int = Field(default=0, description="Which batches a step takes.")


class LsqConfig(ModeConfig):
    """Config of mode ``lsq``."""

    epochs: int = Field(default=2, ge=1, description="How often the calibration data is seen.")
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Batches of calibration data in a step; as many as make about a thousand "
        "tokens if left out.",
    )
    rate: float = Field(
        default=1e-3, gt=0, description="Learning rate of scales, relative to each scale."
    )
    loss: Literal["auto", "kl", "mse"] = Field(
        default="auto",
        description="How far outputs are from the original model's: the divergence of predictions, "
        "the squared error of outputs, or whichever fits the outputs.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Of matrix products; 'auto' takes bfloat16 where it is faster."
    )
    seed: int = Field(default=0, description="The order of batches.")


class ExportQuantizeConfig(ModeConfig):
    """Config of mode ``export_quantize``: there is nothing to set."""


class CompressConfig(ModeConfig):
    """Config of mode ``compress``."""

    scale_dtype: Literal["auto", "float16", "float32"] = Field(
        default="auto",
        description="As what scales of format fp32 are stored: 'auto' takes float16 for groups and "
        "float32 where few share a tensor. What is too small or large for float16 is float32.",
    )
    fuse: bool = Field(
        default=True,
        description="Run norms, gated activations, causal attention and, for the next token, whole "
        "blocks by the kernel library where it has kernels for them: in float32 and "
        "bfloat16 on a CPU.",
    )


class DecompressConfig(ModeConfig):
    """Config of mode ``decompress``: there is nothing to set."""
