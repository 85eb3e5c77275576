# SPDX-License-Identifier: Apache-2.0
"""The search of a recipe's step: what a run brings for it, and how a language model is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.calibration.forward import run_batch
from modewright.errors import ConfigError
from modewright.evaluation.outputs import main_output
from modewright.modes.registry import ModeRegistry
from modewright.modes.search import SearchResult, search
from modewright.recipes.schema import RecipeStep, SearchPart

CHECKPOINT = "search.safetensors"


def search_step(
    model: nn.Module,
    step: RecipeStep,
    part: SearchPart,
    registry: ModeRegistry,
    *,
    calibration: object,
    mode_kwargs: Mapping[str, Any],
    folder: Path | None,
    on_trial: Callable[[int, int | None], None],
) -> SearchResult:
    """Apply a step's mode and search what it opens.

    Args:
        model: The model.
        step: The step.
        part: Its search.
        registry: Where the mode is looked up.
        calibration: The run's calibration data.
        mode_kwargs: What the mode's ``convert`` gets.
        folder: Where progress is kept if the recipe names no checkpoint; ``None`` to keep none.
        on_trial: Called with how much is done, and how much there is.
    """
    path = part.checkpoint or (None if folder is None else folder / step.mode / CHECKPOINT)
    config = {
        **part.options,
        "calibration": calibration,
        "loss_func": next_token_loss,
        "checkpoint": path,
        "on_trial": on_trial,
    }
    return search(
        model,
        (step.mode, step.config or None),
        part.constraints,
        registry=registry,
        dummy_input=_measured_input(calibration, part.input_length),
        config=config,
        mode_kwargs=mode_kwargs,
    )


def next_token_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean loss of predicting each next token of a batch, in nats.

    Args:
        model: A language model.
        batch: Token ids int64 ``[n, length]``, or a dict that holds them as ``input_ids``.

    Raises:
        ConfigError: The batch holds no token ids, or the model puts out no logits for them.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim != 2:
        raise ConfigError(
            "A run scores language models, by the tokens that they predict: batches of token ids "
            "[n, length] were expected. For other models call modewright.search with a score_func."
        )
    logits, _ = main_output(run_batch(model, batch), "a search")
    if logits.shape[:2] != ids.shape:
        raise ConfigError(
            f"A run scores language models: logits [{ids.shape[0]}, {ids.shape[1]}, tokens] were "
            f"expected, the model puts out {list(logits.shape)}. Call modewright.search with a "
            "score_func."
        )
    targets = ids[:, 1:].to(logits.device)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())


def _measured_input(calibration: object, length: int | None) -> Any:
    """Return the input that costs are measured on: the first batch, cut to some tokens."""
    if not isinstance(calibration, Sequence) or not calibration:
        return None
    first = calibration[0]
    if length is None:
        return first
    if isinstance(first, torch.Tensor) and first.ndim >= 2:
        return first[:, :length]
    if isinstance(first, Mapping) and all(
        torch.is_tensor(v) and v.ndim >= 2 for v in first.values()
    ):
        return {name: value[:, :length] for name, value in first.items()}
    raise ConfigError("input_length cuts batches [n, length, ...]; these have another form.")
