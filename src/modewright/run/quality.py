# SPDX-License-Identifier: Apache-2.0
"""How good a model is before and after a run: by the text it predicts, or by the outputs it keeps.

A language model is measured by its loss, and by how far its predictions are from the original's.
Of any other network it is measured how alike its outputs are to the original's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from modewright.calibration.self_text import writes_text
from modewright.evaluation.language import (
    LanguageQuality,
    evaluate_language,
    kl_divergence,
    reference_log_probs,
)
from modewright.evaluation.outputs import output_similarity, reference_outputs

OnWindow = Callable[[int, int], None]


@dataclass(frozen=True)
class Baseline:
    """What was measured of the original.

    Attributes:
        language: How well it predicts; ``None`` if it is no language model.
        reference: What others are compared with: log probabilities ``[k, length, vocabulary]`` of
            a language model, outputs ``[n, features]`` of another.
    """

    language: LanguageQuality | None
    reference: torch.Tensor


@dataclass(frozen=True)
class Quality:
    """What was measured of the optimized model; what does not apply is ``None``.

    Attributes:
        language: How well it predicts.
        divergence: Mean KL divergence from the original's predictions, nats per token.
        similarity: Mean cosine similarity of its outputs to the original's.
    """

    language: LanguageQuality | None = None
    divergence: float | None = None
    similarity: float | None = None


def measure_original(model: nn.Module, inputs: torch.Tensor, on_window: OnWindow) -> Baseline:
    """Measure a model before it is changed.

    Args:
        model: The model.
        inputs: Windows of token ids ``[n, length]`` int64, or for other networks ``[n, ...]``.
        on_window: Called after each with how many are done, and how many there are.

    Raises:
        DataError: The model cannot take them, or puts out nothing that can be measured.
    """
    if _is_language_model(model, inputs):
        quality = evaluate_language(model, inputs, on_window=on_window)
        return Baseline(quality, reference_log_probs(model, inputs))
    return Baseline(None, reference_outputs(model, inputs, on_window=on_window))


def measure_optimized(
    model: nn.Module, inputs: torch.Tensor, baseline: Baseline, on_window: OnWindow
) -> Quality:
    """Measure a model after it was changed; arguments as for `measure_original`.

    Raises:
        DataError: As `measure_original` does.
    """
    if baseline.language is None:
        found = output_similarity(baseline.reference, model, inputs, on_window=on_window)
        return Quality(similarity=found)
    quality = evaluate_language(model, inputs, on_window=on_window)
    return Quality(quality, kl_divergence(baseline.reference, model, inputs))


def _is_language_model(model: nn.Module, inputs: torch.Tensor) -> bool:
    if inputs.is_floating_point():
        return False
    # What is no window of tokens is refused with a reason where language models are measured.
    return inputs.ndim != 2 or inputs.shape[1] < 2 or writes_text(model, inputs[:1])
