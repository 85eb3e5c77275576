# SPDX-License-Identifier: Apache-2.0
"""Allocation: how many zeros each layer gets, so that together they cost least.

If a layer's loss is the sum of the scores of what becomes zero, a given number of zeros costs least
where every layer loses the weights below one common score: otherwise a zero could be moved from a
layer where the last one cost more to one where the next one costs less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LEVELS = 1000
_HALVINGS = 60


def score_levels(scores: torch.Tensor) -> torch.Tensor:
    """Return the scores at :data:`LEVELS` evenly spaced ranks, rising, as parts of their sum.

    So the loss of a layer counts relative to what it puts out at all, for the weights of which
    there are many and the sum of all scores stands for it.

    Args:
        scores: What is lost with every weight of a layer, any shape.
    """
    ranked = scores.double().flatten().sort().values
    ranks = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS * len(ranked)
    return ranked[ranks.long().clamp(max=len(ranked) - 1)] / ranked.sum().clamp_min(1e-300)


def allocate(
    levels: Sequence[torch.Tensor], sizes: Sequence[int], sparsity: float, span: float
) -> list[float]:
    """Return the sparsity of every layer.

    Args:
        levels: Of every layer what :func:`score_levels` returned.
        sizes: How many weights each has.
        sparsity: The part of all weights that becomes zero.
        span: How far a layer's sparsity may be from that.

    Returns:
        The sparsities; weighted by the sizes their mean is ``sparsity``, to a weight or so.
    """
    least, most = max(0.0, sparsity - span), min(1.0, sparsity + span)
    whole = sum(sizes)

    def at(threshold: float) -> list[float]:
        parts = [float((level < threshold).double().mean()) for level in levels]
        return [min(max(part, least), most) for part in parts]

    def mean(parts: Sequence[float]) -> float:
        return sum(p * n for p, n in zip(parts, sizes, strict=True)) / whole

    low, high = 0.0, max(float(level[-1]) for level in levels) * 2 + 1e-300
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(at(middle)) < sparsity else (low, middle)
    below, above = at(low), at(high)
    missing, room = sparsity - mean(below), mean(above) - mean(below)
    share = missing / room if room > 0 else 0.0
    return [b + (a - b) * share for b, a in zip(below, above, strict=True)]
