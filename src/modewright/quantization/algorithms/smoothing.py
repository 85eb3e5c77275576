# SPDX-License-Identifier: Apache-2.0
r"""Smoothing factors: move magnitude between a layer's inputs and its weights.

A linear layer computes the same after column ``j`` of its weight is multiplied by ``s[j]`` and
input ``j`` divided by it. What quantization loses changes, though:

* SmoothQuant divides inputs with outliers, which one scale for all of them could not hold, and
  lets the weights, which have more scales, take them over: ``s = amax(x) ** alpha /
  amax(w) ** (1 - alpha)`` (Xiao et al. 2022).
* AWQ makes columns that see large inputs larger, so that rounding costs them relatively less:
  ``s = mean|x| ** ratio / mean|w| ** (1 - ratio)``, with the ratio searched for (Lin et al. 2023).

Channels that are never used (or whose statistics are not finite) have the factor 1.
"""

from __future__ import annotations

import torch

_SMALLEST = 2.0**-14  # and the largest is its inverse: float16 holds both


def smooth_factors(
    input_amax: torch.Tensor, weight_amax: torch.Tensor, alpha: float = 0.5
) -> torch.Tensor:
    """Return SmoothQuant's factors: inputs are divided by them, weights multiplied.

    Args:
        input_amax: The largest magnitude of every input channel, ``[in]``.
        weight_amax: The largest magnitude in every column of the weights that share the input,
            ``[in]``.
        alpha: How much of the difficulty moves to the weights: 0 to 1.

    Returns:
        ``[in]`` float32, positive and finite.
    """
    factors, live = _factors(input_amax, weight_amax, alpha)
    return torch.where(live, _clamped(factors), 1.0)


def awq_factors(
    input_mean_abs: torch.Tensor, weight_mean: torch.Tensor, ratio: float
) -> torch.Tensor:
    """Return AWQ's factors for one ratio: weights are multiplied by them, inputs divided.

    Args:
        input_mean_abs: The mean magnitude of every input channel, ``[in]``.
        weight_mean: The mean magnitude of every column of the weights, ``[in]``, usually relative
            to the largest of its group.
        ratio: How much the inputs decide: 0 to 1. It is searched for.

    Returns:
        ``[in]`` float32, positive and finite; the largest times the smallest is 1, unless they are
        further apart than float16 can hold.
    """
    factors, live = _factors(input_mean_abs, weight_mean, ratio)
    if not live.any():
        return torch.ones_like(factors)
    low, high = torch.aminmax(factors[live])
    return torch.where(live, _clamped(factors / (low.sqrt() * high.sqrt())), 1.0)


def _factors(
    inputs: torch.Tensor, weights: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``inputs ** share / weights ** (1 - share)``, and which channels are in use."""
    inputs, weights = inputs.detach().float(), weights.detach().float()
    live = (inputs > 0) & (weights > 0) & inputs.isfinite() & weights.isfinite()
    factors = inputs**share / weights ** (1 - share)
    return factors, live & (factors > 0) & factors.isfinite()


def _clamped(factors: torch.Tensor) -> torch.Tensor:
    return factors.clamp(_SMALLEST, 1 / _SMALLEST)
