# SPDX-License-Identifier: Apache-2.0
"""What a recipe holds: modes in order, data to calibrate and to measure with, and demands."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

SELF = "self"  # the source of text that the model writes


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextData(_Part):
    """Text, cut into windows of tokens."""

    source: str | tuple[str, ...] = Field(
        default="builtin",
        description="'builtin' (the language reference that Python carries), a .txt, .md or .jsonl "
        "file, a folder of these, 'datasets:NAME[:COLUMN]' (Hugging Face datasets), or 'self' (the "
        "model writes it; only for calibration). Of a list every source gives as many windows.",
    )
    windows: int = Field(default=16, ge=1, description="How many windows.")
    length: int = Field(default=256, ge=2, description="Tokens in a window.")
    augmented: int = Field(
        default=0,
        ge=0,
        description="How many windows more, so that what is learned holds for other text too: a "
        "language model writes them; for other models, and while streaming, they are the windows "
        "again with half of their tokens replaced at random. Only for calibration.",
    )
    seed: int = Field(default=0, description="Which windows are chosen.")

    @property
    def windows_of(self) -> dict[str, int]:
        """How many windows come from each source: as many from all, or one more from the first."""
        sources = (self.source,) if isinstance(self.source, str) else self.source
        share, rest = divmod(self.windows, len(sources))
        return {source: share + (index < rest) for index, source in enumerate(sources)}

    @field_validator("source")
    @classmethod
    def _check_sources(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or (isinstance(value, tuple) and len(set(value)) < len(value)):
            raise ValueError("expected a source, or a list of different ones")
        return value


class SearchPart(_Part):
    """The search of what a mode opens."""

    constraints: dict[str, float | str] = Field(
        min_length=1,
        description="Upper bounds, absolute or relative to the whole model: 'flops: 60%', "
        "'effective_bits: 4.5'; which ones there are depends on the mode.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further options of the mode's searcher."
    )
    checkpoint: str | None = Field(
        default=None,
        description="A file to keep what was found in, for other searches too; beside the output, "
        "until that is written, if left out.",
    )
    input_length: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of the input that costs are measured on; a window of calibration data "
        "if left out.",
    )


class RecipeStep(_Part):
    """One mode, and what to do if it fails; a mode without more may be written as its name."""

    mode: str = Field(description="Name of the mode.")
    config: dict[str, Any] = Field(default_factory=dict, description="The mode's config.")
    search: SearchPart | None = Field(
        default=None, description="How to search what the mode opens, if it has a search."
    )
    fallback: tuple[RecipeStep, ...] = Field(
        default=(), description="Modes to apply instead if this one cannot be applied."
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value


class Checks(_Part):
    """What the optimized model must satisfy; a run that misses one says so and fails."""

    max_loss_increase: float | None = Field(
        default=None, description="Nats per token above the original model."
    )
    max_kl_divergence: float | None = Field(
        default=None, description="Mean KL divergence from the original model, in nats."
    )
    max_cosine_distance: float | None = Field(
        default=None,
        description="1 less the mean cosine similarity of outputs to the original's; for models "
        "that are no language models.",
    )


class Recipe(_Part):
    """A workflow: modes in order, with data and demands."""

    name: str = Field(description="Name of the recipe.")
    summary: str = Field(default="", description="One line: what it does, and for whom.")
    model: str | None = Field(default=None, description="The model, if the recipe is for one.")
    steps: tuple[RecipeStep, ...] = Field(min_length=1, description="The modes, in order.")
    calibration: TextData = Field(
        default=TextData(windows=32), description="Text that modes may look at."
    )
    evaluation: TextData = Field(
        default=TextData(), description="Text to measure quality on; never shared with calibration."
    )
    checks: Checks = Field(default=Checks(), description="What the result must satisfy.")
    stream: bool | Literal["auto"] = Field(
        default=False,
        description="Go block by block from the model's files to the output, for a model larger "
        "than memory; no quality is measured. 'auto' does so if the weights as float32 would take "
        "more than half of the memory that is free.",
    )

    @field_validator("evaluation")
    @classmethod
    def _check_evaluation(cls, value: TextData) -> TextData:
        if SELF in value.windows_of:
            raise ValueError(
                f"a model cannot be measured on text that it wrote: {SELF!r} is for calibration"
            )
        if value.augmented:
            raise ValueError("augmented windows are for calibration: they are no text")
        return value

    # Where the recipe was read from, and the line of everything in it; empty if from no file.
    _origin: str = PrivateAttr(default="")
    _lines: dict[tuple[str | int, ...], int] = PrivateAttr(default_factory=dict)

    def place(self, *path: str | int) -> str:
        """Return ``FILE:LINE`` of a field, or ``recipe NAME`` if it was read from no file."""
        for end in range(len(path), -1, -1):
            if path[:end] in self._lines:
                return f"{self._origin}:{self._lines[path[:end]]}"
        return self._origin or f"recipe {self.name!r}"

    def modes(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the steps as ``apply_mode`` and ``plan`` take them."""
        return [(step.mode, step.config) for step in self.steps]
