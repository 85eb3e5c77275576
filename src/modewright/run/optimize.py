# SPDX-License-Identifier: Apache-2.0
"""``optimize``: the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from modewright.builtin_modes import default_registry
from modewright.modes.checkpoint import inspect
from modewright.modes.planning import Plan
from modewright.modes.registry import ModeRegistry
from modewright.recipes.checking import check_steps
from modewright.recipes.loader import load_recipe
from modewright.recipes.schema import Recipe
from modewright.run.device import named_device, require_cpu
from modewright.run.planning import plan_recipe
from modewright.run.progress import Progress, require_replaceable
from modewright.run.result import Result
from modewright.run.stages import OnProgress, Run
from modewright.run.streaming.choice import is_streamed
from modewright.run.streaming.run import plan_stream, stream_model
from modewright.run.subject import Subject

Stream = bool | Literal["auto"] | None
RecipeLike = str | Path | Mapping[str, Any] | Recipe


def optimize(
    model: object,
    recipe: RecipeLike,
    *,
    calibration: object = None,
    evaluation: torch.Tensor | None = None,
    output: str | Path | None = None,
    stream: Stream = None,
    device: str | None = None,
    registry: ModeRegistry | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Optimize a model by a recipe, and prove and measure what came out.

    The original is measured, modes are applied, the result is saved, restored (a model from files
    in a fresh process) and compared bit for bit, and measured again.
    With an ``output``, a run that was killed goes on where it stopped when it is called again.

    Args:
        model: A Hugging Face folder, a GGUF file or ``"demo:smollm2"``; or a module or model-like,
            which is converted in place.
        recipe: The name of a recipe, a YAML file, its content, or a :class:`modewright.Recipe`.
        calibration: Batches, or a function that runs the model; overrides the recipe's data.
        evaluation: Token windows ``[windows, length]`` int64, or what else a network takes, to
            measure with; overrides the recipe's data, needed by a model without a tokenizer.
        output: The folder to write; it appears when everything is done.
        stream: Go block by block from files to output; nothing is measured then, and the result's
            model has no weights. ``"auto"`` does so if the weights would fill half the free memory.
        device: Where a model from files is optimized and measured, such as ``"cuda"``; the CPU if
            left out.
        registry: Where modes are looked up; the default registry if left out.
        on_progress: Called with the name of a part, how much of it is done, and how much there is.

    Returns:
        A :class:`modewright.Result`.

    Raises:
        ConfigError: The recipe, the output or the device is not usable.
        DataError: The model or the data cannot be loaded, or there is too little of it.
        IncompatibleModeError: The recipe's modes cannot follow one another.
        ApplyModeError: A mode failed and has no fallback.
        CheckpointError: What was saved does not restore to the same bits.
    """
    run = _prepared(recipe, registry, on_progress, stream)
    place = named_device(device)
    target = None if output is None else Path(output)
    if is_streamed(run.recipe, model):
        require_cpu(place)
        return stream_model(run, model, target, calibration, evaluation)
    require_replaceable(target)
    return _in_memory(run, run.load(model, place), target, calibration, evaluation)


def _in_memory(
    run: Run,
    subject: Subject,
    target: Path | None,
    calibration: object,
    evaluation: torch.Tensor | None,
) -> Result:
    """Do all parts of a run on a model that is in memory."""
    plan_recipe(subject.model, run.recipe.steps, run.registry).require_ok()
    data = run.load_data(subject, calibration, evaluation, target)
    progress = Progress(target, "" if target is None else run.fingerprint(subject, data))
    size_before = inspect(subject.model).bytes
    baseline = run.measure_baseline(subject, data, progress)
    optimized = run.apply_steps(subject, data, progress)
    with progress.result_folder() as folder:
        run.save(subject, optimized, folder)
        where = run.check_restored(subject, optimized, folder, data)
        measured = (size_before, baseline, run.measure(optimized, data, baseline))
        result = run.result(subject, optimized, data, target, where, measured)
        progress.keep_result(result)
        progress.publish()
    return result


def dry_run(
    model: object,
    recipe: RecipeLike,
    *,
    stream: Stream = None,
    registry: ModeRegistry | None = None,
    on_progress: OnProgress | None = None,
) -> Plan:
    """Say what :func:`optimize` would do to a model, or why it may not; change nothing.

    When streaming no weight is read.

    Raises:
        ConfigError: The recipe cannot be applied block by block.
    """
    run = _prepared(recipe, registry, on_progress, stream)
    if is_streamed(run.recipe, model):
        return plan_stream(run, model)
    subject = run.load(model)
    return plan_recipe(subject.model, run.recipe.steps, run.registry)


def _prepared(
    recipe: RecipeLike,
    registry: ModeRegistry | None,
    on_progress: OnProgress | None,
    stream: Stream,
) -> Run:
    """Read the recipe and check what it says of modes, before anything is loaded."""
    registry = default_registry if registry is None else registry
    loaded = load_recipe(recipe)
    if stream is not None:
        loaded = loaded.model_copy(update={"stream": stream})
    check_steps(loaded, registry)
    return Run(loaded, registry, on_progress or _silent)


def _silent(name: str, done: int, total: int | None) -> None:
    """Show nothing."""
