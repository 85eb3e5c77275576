# SPDX-License-Identifier: Apache-2.0
"""Percentile ranges: leave out the rarest values on both sides.

Activations have a few values far away from all others. A range that gives them up spends its codes
on the rest (Wu et al. 2020, "Integer Quantization for Deep Learning Inference"). How many values
may saturate is chosen, not searched.
"""

from __future__ import annotations

from typing import Protocol

import torch

from modewright.errors import ConfigError, DataError


class Histogram(Protocol):
    """What the algorithms need to know of how often values were seen."""

    @property
    def counts(self) -> torch.Tensor:
        """How many values each bin holds, ``[bins]``."""

    @property
    def edges(self) -> torch.Tensor:
        """Where bins begin and end, ascending, ``[bins + 1]`` float32."""

    @property
    def range(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The smallest and the largest value, scalars; ``None`` if nothing was seen."""


def percentile_range(histogram: Histogram, percentile: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a range that holds at least the central part of all values.

    Args:
        histogram: How often values were seen.
        percentile: How many percent of the values the range has to hold: above 0, at most 100.
            At most half of the others lie below it, and half above.

    Returns:
        Minimum and maximum, scalars of the dtype of the histogram's range: ends of bins, or of
        what was seen; for 100 the smallest and the largest value.

    Raises:
        ConfigError: ``percentile`` is out of range.
        DataError: Nothing was seen.
    """
    if not 0 < percentile <= 100:
        raise ConfigError(f"percentile is above 0 and at most 100; received {percentile}.")
    low, high = seen_range(histogram)
    running = histogram.counts.cumsum(0)
    total = int(running[-1])
    outside = int(total * (100 - percentile) / 200)  # values that may be left out on each side
    first = torch.searchsorted(running, outside, right=True)
    last = torch.searchsorted(running, total - outside)
    edges = histogram.edges
    return (
        torch.maximum(low, edges[first].to(low)),
        torch.minimum(high, edges[last + 1].to(high)),
    )


def seen_range(histogram: Histogram) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest value of a histogram.

    Raises:
        DataError: Nothing was seen.
    """
    if histogram.range is None:
        raise DataError("a histogram of no values has no range: calibrate with data that arrives.")
    return histogram.range
