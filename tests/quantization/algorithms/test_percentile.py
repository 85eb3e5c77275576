# SPDX-License-Identifier: Apache-2.0
"""Percentile ranges hold at least what they promise, and hardly more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.calibration.histogram import HistogramObserver
from modewright.errors import ConfigError, DataError
from modewright.quantization.algorithms.percentile import percentile_range


def histogram(data: torch.Tensor, bins: int = 8192) -> HistogramObserver:
    observer = HistogramObserver(bins)
    observer.update(data)
    return observer


def slow_range(
    counts: list[int], edges: list[float], seen: tuple[float, float], percentile: float
) -> tuple[float, float]:
    """Take bins off both ends while what was taken off an end is not too much."""
    allowed = int(sum(counts) * (100 - percentile) / 200)
    first, last, below, above = 0, len(counts) - 1, 0, 0
    while below + counts[first] <= allowed:
        below += counts[first]
        first += 1
    while above + counts[last] <= allowed:
        above += counts[last]
        last -= 1
    return max(seen[0], edges[first]), min(seen[1], edges[last + 1])


@given(
    data=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
    percentile=st.sampled_from([100.0, 99.0, 90.0, 75.0, 50.0, 10.0, 0.1]),
)
def test_it_agrees_with_taking_bins_off_one_by_one_and_holds_enough(
    data: list[float], percentile: float
) -> None:
    tensor = torch.tensor(data)
    observer = histogram(tensor, bins=32)
    low, high = percentile_range(observer, percentile)
    seen = min(data), max(data)
    expected = slow_range(observer.counts.tolist(), observer.edges.tolist(), seen, percentile)
    assert (low.item(), high.item()) == expected
    held = ((tensor >= low) & (tensor <= high)).sum().item()
    assert held >= len(data) * percentile / 100 - 1e-9


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.75])
def test_it_is_the_order_statistics_of_numpy_up_to_one_bin(percentile: float) -> None:
    data = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) ** 3
    observer = histogram(data)
    low, high = percentile_range(observer, percentile)
    ordered, outside = np.sort(data.numpy()), int(50_000 * (100 - percentile) / 200)
    width = (observer.edges[1] - observer.edges[0]).item()
    lowest, highest = ordered[outside], ordered[-1 - outside]
    assert lowest - width <= low.item() <= lowest
    assert highest <= high.item() <= highest + width


def test_all_values_are_the_exact_range() -> None:
    observer = histogram(torch.tensor([-0.3, 0.1, 7.7]))
    assert percentile_range(observer, 100) == observer.range


def test_a_single_outlier_is_left_out() -> None:
    data = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([50.0])])
    low, high = percentile_range(histogram(data), 99.9)
    assert -1.0 <= low < -0.99
    assert 0.98 < high < 1.02


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1])
def test_a_percentile_out_of_range_is_refused(percentile: float) -> None:
    with pytest.raises(ConfigError, match="at most 100; received"):
        percentile_range(histogram(torch.ones(3)), percentile)


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(DataError, match="no values has no range"):
        percentile_range(HistogramObserver(), 99)
