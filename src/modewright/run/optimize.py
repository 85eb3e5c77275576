# SPDX-License-Identifier: Apache-2.0
"""``optimize``: the whole run."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modewright._version import __version__
from modewright.builtin_modes import default_registry
from modewright.calibration.text import fingerprint, load_documents, make_windows
from modewright.errors import CheckpointError, ModewrightError
from modewright.evaluation.comparison import tensors_identical
from modewright.evaluation.language import (
    LanguageQuality,
    evaluate_language,
    kl_divergence,
    reference_log_probs,
)
from modewright.modes.apply import apply_mode
from modewright.modes.checkpoint import inspect, restore, save
from modewright.modes.codec import dumps
from modewright.modes.planning import Plan, plan
from modewright.modes.registry import ModeRegistry
from modewright.modes.state import note_fallback, state_of
from modewright.modes.storage import replace_text
from modewright.quantization.size import packed_bytes
from modewright.recipes.loader import load_recipe
from modewright.recipes.schema import Recipe, RecipeStep, TextData
from modewright.run.fresh_restore import fresh_logits, logits_of
from modewright.run.metering import Meter
from modewright.run.progress import Progress, require_replaceable
from modewright.run.result import Check, Result, Skipped, StepResult
from modewright.run.subject import Subject, open_subject

OnProgress = Callable[[str, int, "int | None"], None]
RecipeLike = str | Path | Mapping[str, Any] | Recipe


def optimize(
    model: object,
    recipe: RecipeLike,
    *,
    calibration: object = None,
    evaluation: torch.Tensor | None = None,
    output: str | Path | None = None,
    registry: ModeRegistry | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Optimize a model by a recipe, and prove and measure what came out.

    The original's quality is measured, the modes are applied, the result is saved, restored (in a
    fresh process where the model came from files) and compared bit for bit, and measured again.
    With an ``output``, a run that was killed goes on where it stopped when it is called again.

    Args:
        model: A local Hugging Face folder, a GGUF file or ``"demo:smollm2"``; or a module or
            model-like, which is converted in place.
        recipe: The name of a recipe, a YAML file, its content, or a :class:`modewright.Recipe`.
        calibration: Batches, or a function that runs the model; overrides the recipe's data.
        evaluation: Token windows ``[windows, length]`` int64 to measure with; overrides the
            recipe's data, and is needed to measure a model that comes without a tokenizer.
        output: The folder to write; it appears when everything is done.
        registry: Where modes are looked up; the default registry if left out.
        on_progress: Called with the name of a part, how much of it is done, and how much there is.

    Returns:
        A :class:`modewright.Result`.

    Raises:
        ConfigError: The recipe or the output is not usable.
        DataError: The model or the data cannot be loaded, or there is too little of it.
        IncompatibleModeError: The recipe's modes cannot follow one another.
        ApplyModeError: A mode failed and has no fallback.
        CheckpointError: What was saved does not restore to the same bits.
    """
    run = _Run(load_recipe(recipe), registry or default_registry, on_progress or _silent)
    target = None if output is None else Path(output)
    if target is not None:
        require_replaceable(target)
    with run.timed("load"):
        subject = open_subject(model, registry=run.registry)
    run.plan(subject).require_ok()
    data = run.load_data(subject, calibration, evaluation)
    progress = Progress(target, "" if target is None else run.fingerprint(subject, data))
    size_before = inspect(subject.model).bytes
    baseline = run.measure_baseline(subject, data, progress)
    optimized = run.apply_steps(subject, data, progress)
    with ExitStack() as stack:
        if target is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "result"
        else:
            folder = progress.result_folder
        run.save(subject, optimized, folder)
        restored_in = run.check_restored(subject, optimized, folder, data)
        quality, divergence = run.measure(optimized, data, baseline)
        result = Result(
            model=optimized,
            recipe=run.recipe.name,
            source=subject.source,
            output=target,
            steps=tuple(run.steps),
            size_before=size_before,
            size_after=inspect(optimized).bytes,
            packed_size=_packed_size(optimized),
            baseline=None if baseline is None else baseline[0],
            optimized=quality,
            kl_divergence=divergence,
            restored_identical=True,
            restored_in=restored_in,
            skipped=_skipped(optimized),
            checks=run.checks(baseline, quality, divergence),
            calibration=data.calibration_fingerprint,
        )
        if target is not None:
            replace_text(folder / "result.json", dumps(_finite(result.to_dict())))
            progress.publish()
    return result


def dry_run(
    model: object,
    recipe: RecipeLike,
    *,
    registry: ModeRegistry | None = None,
    on_progress: OnProgress | None = None,
) -> Plan:
    """Say what :func:`optimize` would do to a model, or why it may not; change nothing."""
    run = _Run(load_recipe(recipe), registry or default_registry, on_progress or _silent)
    with run.timed("load"):
        subject = open_subject(model, registry=run.registry)
    return plan(subject.model, run.recipe.modes(), registry=run.registry)


@dataclass(frozen=True)
class _Data:
    """The data of a run: what modes may look at, and what quality is measured on."""

    calibration: object = None
    calibration_fingerprint: str | None = None
    windows: torch.Tensor | None = None

    @property
    def probe(self) -> torch.Tensor | None:
        """One window, to compare outputs on."""
        return None if self.windows is None else self.windows[:1]


@dataclass
class _Run:
    """The parts of a run, in the order in which they are called."""

    recipe: Recipe
    registry: ModeRegistry
    on_progress: OnProgress
    steps: list[StepResult] = field(default_factory=list)

    def timed(self, name: str) -> _Timed:
        """Return a context that adds a part to the run's steps."""
        self.on_progress(name, 0, None)
        return _Timed(name, self.steps)

    def plan(self, subject: Subject) -> Plan:
        """Check the recipe against the model; a step with a fallback may fail."""
        modes = []
        for step in self.recipe.steps:
            if step.fallback:
                break  # what follows depends on how this one ends
            modes.append((step.mode, step.config))
        return plan(subject.model, modes, registry=self.registry)

    def load_data(
        self, subject: Subject, calibration: object, evaluation: torch.Tensor | None
    ) -> _Data:
        """Cut calibration and evaluation windows from text, or take what the caller brings."""
        windows, mark = evaluation, None
        with self.timed("data"):
            if windows is None and subject.tokenizer is not None:
                windows = _text_windows(subject, self.recipe.evaluation, "evaluation")
            if not self._uses_calibration(self.recipe.steps):
                calibration = None
            elif calibration is None and subject.tokenizer is not None:
                tokens = _text_windows(subject, self.recipe.calibration, "calibration")
                calibration, mark = (
                    [tokens[i : i + 1] for i in range(len(tokens))],
                    fingerprint(tokens),
                )
            elif isinstance(calibration, Iterable):
                if not isinstance(calibration, Sequence):
                    calibration = list(calibration)
                mark = fingerprint(calibration)
        return _Data(calibration, mark, windows)

    def fingerprint(self, subject: Subject, data: _Data) -> str:
        """Return a digest of everything that decides what the run does."""
        parts = {
            "recipe": self.recipe.model_dump(mode="json"),
            "model": subject.revision(),
            "calibration": data.calibration_fingerprint,
            "evaluation": None if data.windows is None else fingerprint(data.windows),
            "versions": [__version__, torch.__version__],
        }
        return hashlib.sha256(dumps(parts).encode()).hexdigest()

    def measure_baseline(
        self, subject: Subject, data: _Data, progress: Progress
    ) -> tuple[LanguageQuality, torch.Tensor] | None:
        """Measure the original model, or take what an interrupted run measured."""
        if data.windows is None:
            return None
        known = progress.baseline()
        if known is not None:
            return known
        with self.timed("baseline"):
            quality = evaluate_language(subject.model, data.windows, on_window=self._on("baseline"))
            reference = reference_log_probs(subject.model, data.windows)
        progress.keep_baseline(quality, reference)
        return quality, reference

    def apply_steps(self, subject: Subject, data: _Data, progress: Progress) -> nn.Module:
        """Apply the recipe's modes, from where an interrupted run stopped."""
        model = progress.restored(subject.model, self.registry)
        self.steps.extend(progress.steps)
        for number, step in enumerate(self.recipe.steps):
            if number >= progress.finished_steps:
                model = self._apply(model, step, data)
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

    def check_restored(self, subject: Subject, model: nn.Module, folder: Path, data: _Data) -> str:
        """Restore what was saved and compare it bit for bit; return where that was done.

        Raises:
            CheckpointError: A bit differs, or it does not restore.
        """
        with self.timed("restore"):
            if subject.from_files and data.probe is not None:
                expected = logits_of(model.eval(), data.probe)
                where, same = (
                    "a fresh process",
                    tensors_identical(fresh_logits(folder, data.probe), expected),
                )
            else:
                where = "this process"
                again = restore(subject.skeleton, folder, registry=self.registry)
                same = tensors_identical(again.state_dict(), model.state_dict())
                if same and data.probe is not None:
                    again.train(model.training).to(next(model.parameters()).device)
                    same = tensors_identical(
                        logits_of(again, data.probe), logits_of(model, data.probe)
                    )
        if not same:
            raise CheckpointError(
                f"The model restored from {folder} in {where} gives other outputs than the "
                "optimized one. A mode of the recipe does not restore what it converts; run "
                "modewright.check_mode on each of them."
            )
        return where

    def measure(
        self,
        model: nn.Module,
        data: _Data,
        baseline: tuple[LanguageQuality, torch.Tensor] | None,
    ) -> tuple[LanguageQuality | None, float | None]:
        """Measure the optimized model, and how far it is from the original."""
        if data.windows is None or baseline is None:
            return None, None
        with self.timed("evaluation"):
            quality = evaluate_language(model, data.windows, on_window=self._on("evaluation"))
            return quality, kl_divergence(baseline[1], model, data.windows)

    def checks(
        self,
        baseline: tuple[LanguageQuality, torch.Tensor] | None,
        quality: LanguageQuality | None,
        divergence: float | None,
    ) -> tuple[Check, ...]:
        """Hold the measurements against the recipe's demands."""
        increase = None if baseline is None or quality is None else quality.loss - baseline[0].loss
        demands = self.recipe.checks
        wanted = (
            ("loss increase", demands.max_loss_increase, increase),
            ("KL divergence", demands.max_kl_divergence, divergence),
        )
        return tuple(
            Check(name=name, limit=limit, value=value)
            for name, limit, value in wanted
            if limit is not None
        )

    def _apply(self, model: nn.Module, step: RecipeStep, data: _Data) -> nn.Module:
        """Apply one step, or what the recipe names in its place if it fails."""
        kwargs: dict[str, Any] = {}
        if step.mode in self.registry and self.registry[step.mode].uses_calibration:
            kwargs = {"calibration": data.calibration, "on_batch": self._on(step.mode)}
        try:
            with self.timed(step.mode):
                return apply_mode(
                    model, (step.mode, step.config), registry=self.registry, mode_kwargs=kwargs
                )
        except ModewrightError as error:
            if not step.fallback:
                raise
            reason = str(error)
        for other in step.fallback:
            model = self._apply(model, other, data)
            self.steps[-1] = self.steps[-1].in_place_of(step.mode, reason)
            note_fallback(model, step.mode, reason)
        return model

    def _uses_calibration(self, steps: Sequence[RecipeStep]) -> bool:
        return any(
            (step.mode in self.registry and self.registry[step.mode].uses_calibration)
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


def _text_windows(subject: Subject, text: TextData, split: Any) -> torch.Tensor:
    documents = load_documents(text.source, split)
    return make_windows(
        documents, subject.encode(), length=text.length, count=text.windows, seed=text.seed
    )


def _packed_size(model: nn.Module) -> int | None:
    """Return the size with quantized weights packed, if the log says that some are."""
    for record in state_of(model) or ():
        if record.name == "quantize":
            return packed_bytes(model, record.metadata["layers"])
    return None


def _skipped(model: nn.Module) -> tuple[Skipped, ...]:
    return tuple(
        Skipped(mode=record.name, module=item["module"], reason=item["reason"])
        for record in state_of(model) or ()
        for item in record.metadata.get("skipped", ())
    )


def _finite(value: Any) -> Any:
    """Return JSON data in which numbers that JSON lacks are strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


def _silent(name: str, done: int, total: int | None) -> None:
    """Show nothing."""
