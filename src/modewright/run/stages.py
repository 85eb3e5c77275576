# SPDX-License-Identifier: Apache-2.0
"""The parts of a run, in the order in which ``optimize`` calls them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modewright._version import __version__
from modewright.builtin_modes import default_registry
from modewright.calibration.text import fingerprint
from modewright.errors import CheckpointError, ModewrightError
from modewright.evaluation.comparison import tensors_identical
from modewright.modes.apply import apply_mode
from modewright.modes.checkpoint import inspect, restore, save
from modewright.modes.codec import dumps
from modewright.modes.registry import ModeRegistry
from modewright.modes.search import SearchResult
from modewright.modes.state import ModeState, note_fallback, state_of
from modewright.quantization.size import packed_bytes
from modewright.recipes.schema import Recipe, RecipeStep
from modewright.run.data import RunData, load_data
from modewright.run.device import device_of
from modewright.run.fresh_restore import fresh_output, output_of
from modewright.run.metering import Meter
from modewright.run.progress import Progress
from modewright.run.quality import Baseline, Quality, measure_optimized, measure_original
from modewright.run.result import Check, Result, Skipped, StepResult
from modewright.run.searching import search_step
from modewright.run.subject import Subject, open_subject

OnProgress = Callable[[str, int, "int | None"], None]
NO_MATCH = "no module is called like this pattern of the recipe"


@dataclass
class Run:
    """The parts of a run, in the order in which they are called."""

    recipe: Recipe
    registry: ModeRegistry
    on_progress: OnProgress
    steps: list[StepResult] = field(default_factory=list)
    searches: list[SearchResult] = field(default_factory=list)

    def timed(self, name: str) -> _Timed:
        """Return a context that adds a part to the run's steps."""
        self.on_progress(name, 0, None)
        return _Timed(name, self.steps)

    def load(self, model: object, device: torch.device | None = None) -> Subject:
        """Load the model from a path or name, or take the one that is there."""
        with self.timed("load"):
            return open_subject(model, registry=self.registry, device=device)

    def load_data(
        self,
        subject: Subject,
        calibration: object,
        evaluation: torch.Tensor | None,
        output: Path | None = None,
    ) -> RunData:
        """Cut windows from text, or take what the caller brings."""
        with self.timed("data"):
            return load_data(
                self.recipe,
                subject,
                uses_calibration=self._uses_calibration(self.recipe.steps),
                calibration=calibration,
                evaluation=evaluation,
                output=output,
                on_batch=self._on("data"),
            )

    def fingerprint(self, subject: Subject, data: RunData) -> str:
        """Return a digest of everything that decides what the run does."""
        parts = {
            "recipe": self.recipe.model_dump(mode="json"),
            "model": subject.revision(),
            "calibration": data.calibration and data.calibration.fingerprint,
            "evaluation": None if data.evaluation is None else fingerprint(data.evaluation),
            "device": str(device_of(subject.model)),
            "versions": [__version__, torch.__version__],
        }
        return hashlib.sha256(dumps(parts).encode()).hexdigest()

    def measure_baseline(
        self, subject: Subject, data: RunData, progress: Progress
    ) -> Baseline | None:
        """Measure the original model, or take what an interrupted run measured."""
        if data.evaluation is None:
            return None
        known = progress.baseline()
        if known is not None:
            return known
        with self.timed("baseline"):
            found = measure_original(subject.model, data.evaluation, self._on("baseline"))
        progress.keep_baseline(found)
        return found

    def apply_steps(self, subject: Subject, data: RunData, progress: Progress) -> nn.Module:
        """Apply the recipe's modes, from where an interrupted run stopped."""
        model = progress.restored(subject.model, self.registry)
        self.steps.extend(progress.steps)
        for number, step in enumerate(self.recipe.steps):
            if number >= progress.finished_steps:
                model = self._apply(model, step, data, progress.blocks_folder(number))
                modes = [s for s in self.steps if s.name in self.registry]
                progress.keep_step(model, number + 1, modes)
        return model

    def save(self, subject: Subject, model: nn.Module, folder: Path) -> None:
        """Write everything that another process needs to restore the model."""
        with self.timed("save"):
            save(model, folder)
            if subject.from_files:
                from modewright.integrations.transformers import save_assets

                save_assets(model, subject.tokenizer, folder)

    def check_restored(
        self, subject: Subject, model: nn.Module, folder: Path, data: RunData
    ) -> str:
        """Restore what was saved and compare it bit for bit; return where that was done.

        Raises:
            CheckpointError: A bit differs, or it does not restore.
        """
        with self.timed("restore"):
            if self._can_be_fresh(subject, model) and data.probe is not None:
                where = "a fresh process"
                expected = output_of(model.eval(), data.probe)
                fresh = fresh_output(folder, data.probe, device_of(model))
                same = tensors_identical(fresh, expected)
            else:
                where = "this process"
                same = self._restores_here(subject, model, folder, data.probe)
        if not same:
            raise CheckpointError(
                f"The model restored from {folder} in {where} gives other outputs than the "
                "optimized one. A mode of the recipe does not restore what it converts; run "
                "modewright.check_mode on each of them."
            )
        return where

    def _can_be_fresh(self, subject: Subject, model: nn.Module) -> bool:
        """Whether another process finds the model's class and all of its modes."""
        return subject.from_files and all(
            record.name in default_registry and default_registry.is_found_anywhere(record.name)
            for record in state_of(model) or ()
        )

    def _restores_here(
        self, subject: Subject, model: nn.Module, folder: Path, probe: torch.Tensor | None
    ) -> bool:
        """Restore onto an unmodified model in this process, and compare weights and outputs."""
        again = restore(subject.unmodified(folder), folder, registry=self.registry)
        same = tensors_identical(again.state_dict(), model.state_dict())
        if same and probe is not None:
            again.train(model.training).to(device_of(model))
            same = tensors_identical(output_of(again, probe), output_of(model, probe))
        return same

    def measure(self, model: nn.Module, data: RunData, baseline: Baseline | None) -> Quality:
        """Measure the optimized model, and how far it is from the original."""
        if data.evaluation is None or baseline is None:
            return Quality()
        with self.timed("evaluation"):
            return measure_optimized(model, data.evaluation, baseline, self._on("evaluation"))

    def checks(self, baseline: Baseline | None, quality: Quality) -> tuple[Check, ...]:
        """Hold the measurements against the recipe's demands."""
        before = None if baseline is None else baseline.language
        after = quality.language
        increase = None if before is None or after is None else after.loss - before.loss
        distance = None if quality.similarity is None else 1 - quality.similarity
        demands = self.recipe.checks
        wanted = (
            ("loss increase", demands.max_loss_increase, increase),
            ("KL divergence", demands.max_kl_divergence, quality.divergence),
            ("cosine distance", demands.max_cosine_distance, distance),
        )
        return tuple(
            Check(name=name, limit=limit, value=value)
            for name, limit, value in wanted
            if limit is not None
        )

    def result(
        self,
        subject: Subject,
        model: nn.Module,
        data: RunData,
        output: Path | None,
        restored_in: str,
        measured: tuple[int, Baseline | None, Quality],
    ) -> Result:
        """Put together everything that came out.

        ``measured`` holds the size before, and what was measured of the original and of the
        optimized model.
        """
        size_before, baseline, quality = measured
        used = data.calibration is not None and data.calibration.was_used
        return Result(
            model=model,
            recipe=self.recipe.name,
            source=subject.source,
            output=output,
            steps=tuple(self.steps),
            searches=tuple(self.searches),
            size_before=size_before,
            size_after=inspect(model).bytes,
            packed_size=_packed_size(model),
            baseline=None if baseline is None else baseline.language,
            optimized=quality.language,
            kl_divergence=quality.divergence,
            similarity=quality.similarity,
            restored_identical=True,
            restored_in=restored_in,
            skipped=skipped_of(model),
            checks=self.checks(baseline, quality),
            calibration=data.calibration.fingerprint if used and data.calibration else None,
        )

    def _apply(
        self, model: nn.Module, step: RecipeStep, data: RunData, blocks: Path | None
    ) -> nn.Module:
        """Apply one step, or what the recipe names in its place if it fails."""
        kwargs: dict[str, Any] = {}
        if step.mode in self.registry and self.registry[step.mode].uses_calibration:
            batches = None if data.calibration is None else data.calibration.for_mode()
            kwargs = {"calibration": batches, "on_batch": self._on(step.mode)}
            mode = self.registry[step.mode]
            if blocks is not None and mode.resumes:
                kwargs["checkpoint"] = blocks / step.mode
        try:
            with self.timed(step.mode):
                if step.search is None:
                    return apply_mode(
                        model, (step.mode, step.config), registry=self.registry, mode_kwargs=kwargs
                    )
                batches = None if data.calibration is None else data.calibration.for_mode()
                found = search_step(
                    model,
                    step,
                    step.search,
                    self.registry,
                    calibration=batches,
                    mode_kwargs=kwargs,
                    folder=blocks,
                    on_trial=self._on(step.mode),
                )
                self.searches.append(found)
                return found.model
        except ModewrightError as error:
            if not step.fallback:
                raise
            reason = str(error)
        for other in step.fallback:
            model = self._apply(model, other, data, blocks)
            self.steps[-1] = self.steps[-1].in_place_of(step.mode, reason)
            note_fallback(model, step.mode, reason)
        return model

    def _uses_calibration(self, steps: Sequence[RecipeStep]) -> bool:
        return any(
            step.search is not None
            or (step.mode in self.registry and self.registry[step.mode].uses_calibration)
            or self._uses_calibration(step.fallback)
            for step in steps
        )

    def _on(self, name: str) -> Callable[[int, int | None], None]:
        return lambda done, total: self.on_progress(name, done, total)


class _Timed:
    """A context that measures a part of the run and notes it if it ended well."""

    def __init__(self, name: str, steps: list[StepResult]) -> None:
        self._name, self._steps, self._meter = name, steps, Meter()

    def __enter__(self) -> None:
        self._meter.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self._meter.__exit__(kind, error, trace)
        if kind is None:
            seconds, memory = self._meter.seconds, self._meter.peak_memory
            self._steps.append(StepResult(name=self._name, seconds=seconds, peak_memory=memory))


def _packed_size(model: nn.Module) -> int | None:
    """Return the size with quantized weights packed, if the log says that some are."""
    for record in reversed((state_of(model) or ModeState()).for_saving(model).records):
        if record.name in ("quantize", "auto_quantize"):
            return packed_bytes(model, record.metadata["layers"])
    return None


def skipped_of(model: nn.Module) -> tuple[Skipped, ...]:
    """Return what the modes of a model left alone, and why; patterns that matched nothing too."""
    found = []
    for record in state_of(model) or ():
        for item in record.metadata.get("skipped", ()):
            found.append(Skipped(mode=record.name, module=item["module"], reason=item["reason"]))
        for pattern in record.metadata.get("unmatched", ()):
            found.append(Skipped(mode=record.name, module=pattern, reason=NO_MATCH))
    return tuple(found)
