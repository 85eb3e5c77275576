# SPDX-License-Identifier: Apache-2.0
"""``Result``: everything that came out of a run; reports only render it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from modewright.evaluation.language import LanguageQuality
from modewright.modes.search import SearchResult


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One applied mode, or another part of the run.

    Attributes:
        name: The mode, or "load", "baseline", "save", "restore", "evaluation".
        seconds: Wall-clock seconds.
        peak_memory: Largest resident set of the process, in bytes.
        fallback_for: The mode that failed and in whose place this one was taken.
        fallback_reason: Why it failed.
        resumed: Whether it was done by an earlier run that this one goes on from.
    """

    name: str
    seconds: float
    peak_memory: int
    fallback_for: str | None = None
    fallback_reason: str | None = None
    resumed: bool = False

    def in_place_of(self, mode: str, reason: str) -> StepResult:
        """Return this step, marked as the fallback for another mode."""
        return replace(self, fallback_for=mode, fallback_reason=reason)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A module that was matched and left alone, and why."""

    mode: str
    module: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """A demand of the recipe, what was measured, and whether that satisfies it."""

    name: str
    limit: float
    value: float | None

    @property
    def passed(self) -> bool:
        """Whether the value was measured and is within the limit."""
        return self.value is not None and self.value <= self.limit


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of :func:`modewright.optimize`.

    Attributes:
        model: The optimized model, with its mode state.
        recipe: Name of the recipe.
        source: The model as it was named, or its class.
        output: The folder that was written, if any.
        steps: Every part of the run, in order.
        size_before: Bytes of the weights before; tied ones count once.
        size_after: Bytes of the weights as they were saved.
        packed_size: Bytes they would take with the quantized ones packed; ``None`` if none is.
        baseline: Quality of the original model; ``None`` if there was nothing to measure with.
        optimized: Quality of the optimized model.
        kl_divergence: Mean KL divergence of the optimized from the original model, nats per token.
        similarity: Mean cosine similarity of the outputs to the original's, for a model that is no
            language model.
        restored_identical: Whether the model restored from what was saved gave the same bits.
        restored_in: Where it was restored: "a fresh process" or "this process".
        skipped: What modes left alone, and why.
        checks: The recipe's demands.
        calibration: Fingerprint of the calibration data; ``None`` if no mode used any.
        searches: What searches found, in order; those of an earlier run that this one went on from
            are not among them.
    """

    model: nn.Module = field(repr=False)
    recipe: str
    source: str
    output: Path | None
    steps: tuple[StepResult, ...]
    size_before: int
    size_after: int
    packed_size: int | None
    baseline: LanguageQuality | None
    optimized: LanguageQuality | None
    kl_divergence: float | None
    restored_identical: bool | None
    restored_in: str | None
    skipped: tuple[Skipped, ...]
    checks: tuple[Check, ...]
    calibration: str | None
    searches: tuple[SearchResult, ...] = ()
    similarity: float | None = None

    @property
    def loss_increase(self) -> float | None:
        """Nats per token above the original model."""
        if self.baseline is None or self.optimized is None:
            return None
        return self.optimized.loss - self.baseline.loss

    @property
    def ok(self) -> bool:
        """Whether the recipe's demands are satisfied."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it but the model, as JSON data."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "model"}
        data["searches"] = [found.to_dict() for found in self.searches]
        data["output"] = None if self.output is None else str(self.output)
        for name in ("steps", "skipped"):
            data[name] = [asdict(item) for item in data[name]]
        data["checks"] = [{**asdict(check), "passed": check.passed} for check in self.checks]
        for name in ("baseline", "optimized"):
            quality = data[name]
            if quality is not None:
                data[name] = {**asdict(quality), "perplexity": quality.perplexity}
        data["loss_increase"] = self.loss_increase
        data["ok"] = self.ok
        finite: dict[str, Any] = _finite(data)
        return finite


def _finite(value: Any) -> Any:
    """Return JSON data in which numbers that JSON lacks are strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
