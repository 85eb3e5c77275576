# SPDX-License-Identifier: Apache-2.0
"""What a user may set on the sparsity modes. Imports no torch, so that it can be shown fast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from modewright.modes.config import ModeConfig
from modewright.sparsity.pattern import parse_pattern

DEFAULT_SPARSITY = 0.5


def _known_pattern(text: str) -> str:
    parse_pattern(text)
    return text


PatternText = Annotated[str, AfterValidator(_known_pattern)]


class SparseRule(BaseModel):
    """What is different for some layers; later rules win."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: tuple[str, ...] = Field(
        min_length=1, description="Patterns of module paths or class names that the rule is for."
    )
    ignore: tuple[str, ...] = Field(default=(), description="Patterns of exceptions from targets.")
    pattern: PatternText | None = Field(default=None, description="Another pattern of zeros.")
    sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="Another part of zeros; 0 leaves the layers dense."
    )


class SparseConfig(ModeConfig):
    """What all modes have that make a model sparse."""

    pattern: PatternText = Field(
        default="2:4",
        description="Where zeros may lie: 'N:M' (N of M neighbouring inputs keep their weight), "
        "'unstructured', or 'RxC' (tiles of R outputs by C inputs).",
    )
    sparsity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="The part of zeros, 0.5 if left out; N:M says it itself.",
    )
    allocation: Literal["uniform", "error"] = Field(
        default="uniform",
        description="Give every layer the same sparsity, or more to layers that lose less by it, "
        "with the same number of zeros in all; not for N:M.",
    )
    span: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="With allocation 'error': how far a layer's sparsity may be from the mean.",
    )
    targets: tuple[str, ...] | None = Field(
        default=None,
        description="Patterns of the modules to make sparse; every linear layer, convolution and "
        "fused expert if left out.",
    )
    ignore: tuple[str, ...] = Field(default=(), description="Patterns of modules to leave alone.")
    rules: tuple[SparseRule, ...] = Field(
        default=(), description="Exceptions, in order; later rules win over earlier ones."
    )
    on_unmatched: Literal["error", "report"] = Field(
        default="error",
        description="What to do about a pattern that matches no module: fail, or list it.",
    )

    @model_validator(mode="after")
    def _check(self) -> SparseConfig:
        own = parse_pattern(self.pattern).fixed_sparsity
        if own is not None and self.sparsity not in (None, own):
            raise ValueError(
                f"pattern {self.pattern!r} makes {own:.4g} of the weights zero; leave out sparsity"
            )
        return self


class SparseMagnitudeConfig(SparseConfig):
    """Config of mode ``sparse_magnitude``."""


class CalibratedSparseConfig(SparseConfig):
    """What all modes have that look at data."""

    max_row_norm: float | None = Field(
        default=None,
        gt=0,
        description="Scale down inputs longer than so many times the median one; no limit if left "
        "out, which loses less where a block makes such inputs.",
    )
    min_tokens: int = Field(
        default=64,
        ge=0,
        description="A layer (an expert) that sees fewer tokens is masked by magnitude.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Of matrix products while the network is run; 'auto' takes bfloat16 where it "
        "is faster.",
    )
    epochs: int = Field(
        default=0,
        ge=0,
        description="How often the data is gone through at the end to train the kept weights on "
        "the original model's outputs, with the masks fixed.",
    )
    rate: float = Field(default=2e-4, gt=0, description="Learning rate of that; falls to zero.")
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Batches of calibration data in a step; as many as make about a thousand "
        "tokens if left out.",
    )
    loss: Literal["auto", "kl", "mse"] = Field(
        default="auto",
        description="How far outputs are from the original model's: the divergence of predictions, "
        "the squared error of outputs, or whichever fits the outputs.",
    )
    seed: int = Field(default=0, description="The order of batches.")


class WandaConfig(CalibratedSparseConfig):
    """Config of mode ``wanda``."""


class SparsegptConfig(CalibratedSparseConfig):
    """Config of mode ``sparsegpt``."""

    damping: float = Field(
        default=0.01, gt=0, description="Added to the Hessian's diagonal, as a part of its mean."
    )
    correct_inputs: bool = Field(
        default=False,
        description="Approximate the output that a layer had on the original inputs, on those that "
        "it gets after earlier layers became sparse.",
    )
    correction_damping: float = Field(
        default=0.1, gt=0, description="How strongly that is held at the original weight."
    )


class AlpsConfig(SparsegptConfig):
    """Config of mode ``alps``."""

    iterations: int = Field(
        default=60, ge=1, description="Alternations at most; they end when the mask has settled."
    )
    refit_iterations: int = Field(
        default=20, ge=0, description="Steps of conjugate gradients on the final mask."
    )


class ExportSparseConfig(ModeConfig):
    """Config of mode ``export_sparse``: there is nothing to set."""
