# SPDX-License-Identifier: Apache-2.0
"""Histograms: bins agree with counting, and parts of the data merge to what the whole gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.calibration.histogram import HistogramObserver
from modewright.errors import ConfigError, DataError
from modewright.quantization.quantizer import Quantizer
from modewright.quantization.representation import QuantizerConfig

values = st.lists(
    st.floats(width=32) | st.floats(-8, 8, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-45]),
    max_size=12,
)


def observed(*batches: torch.Tensor, bins: int = 64) -> HistogramObserver:
    observer = HistogramObserver(bins)
    for batch in batches:
        observer.update(batch)
    return observer


def assert_same(one: HistogramObserver, other: HistogramObserver) -> None:
    assert one.exponent == other.exponent
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.edges, other.edges)
    assert one.range == other.range
    assert one.nonfinite == other.nonfinite


def slow_counts(numbers: list[float], edges: list[float]) -> list[int]:
    counts = [0] * (len(edges) - 1)
    for number in numbers:
        counts[max(place for place in range(len(counts)) if edges[place] <= number)] += 1
    return counts


@given(first=values, second=values, third=values)
def test_parts_of_the_data_merge_to_what_the_whole_gives(
    first: list[float], second: list[float], third: list[float]
) -> None:
    parts = [observed(torch.tensor(part)) for part in (first, second, third)]
    merged = HistogramObserver(64)
    for part in reversed(parts):
        merged.merge(part)
    batches = observed(*(torch.tensor(part) for part in (first, second, third)))
    assert_same(merged, observed(torch.tensor(first + second + third)))
    assert_same(batches, merged)


@given(numbers=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=12))
def test_every_value_is_in_the_bin_between_whose_ends_it_lies(numbers: list[float]) -> None:
    observer = observed(torch.tensor(numbers))
    assert observer.counts.tolist() == slow_counts(numbers, observer.edges.tolist())


def test_counts_agree_with_numpy() -> None:
    data = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 3
    observer = HistogramObserver()
    for part in data.split(777):
        observer.update(part)
    theirs, _ = np.histogram(data.double().numpy(), observer.edges.double().numpy())
    assert observer.counts.tolist() == theirs.tolist()
    assert observer.edges[-1] == 16.0  # the next power of two above 3 * 4.2
    assert observer.range == (data.min(), data.max())


def test_the_range_doubles_until_it_holds_the_largest_value() -> None:
    observer = observed(torch.tensor([0.9, -0.2]), bins=8)
    assert observer.edges.tolist() == [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert observer.counts.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    observer.update(torch.tensor([-4.0]))  # a power of two is no longer inside its own range
    assert observer.edges.tolist() == [-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0]
    assert observer.counts.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_values_that_are_not_finite_are_counted_apart() -> None:
    observer = observed(torch.tensor([math.nan, 1.0, -math.inf, math.inf, -2.5]))
    assert observer.nonfinite == 3
    assert int(observer.counts.sum()) == 2
    assert observer.range == (torch.tensor(-2.5), torch.tensor(1.0))


@pytest.mark.parametrize(
    "batches", [[], [torch.empty(0)], [torch.tensor([math.nan])]], ids=["none", "empty", "nan"]
)
def test_nothing_seen_is_no_range(batches: list[torch.Tensor]) -> None:
    observer = observed(*batches)
    assert observer.range is None
    assert observer.counts.tolist() == [0] * 64


def test_zeros_do_not_widen_the_range() -> None:
    observer = observed(torch.zeros(5), torch.tensor([2.0**-60]))
    assert observer.edges[-1] == 2.0**-59
    assert observer.counts[32] == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_dtype_and_shape_is_observed(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[[0.5, -2.0]], [[1.0, 0.0]]], dtype=dtype, requires_grad=True)
    assert_same(observed(tensor), observed(torch.tensor([0.5, -2.0, 1.0, 0.0])))


def test_a_double_beyond_float32_is_not_finite() -> None:
    assert observed(torch.tensor([1e300, 1.0], dtype=torch.float64)).nonfinite == 1


def test_a_quantizer_takes_it_as_its_observer() -> None:
    quantizer = Quantizer(QuantizerConfig(), channel_axis=None)
    observer = HistogramObserver()
    quantizer.observer = observer  # type: ignore[assignment]
    tensor = torch.tensor([[1.0, -3.0]])
    assert torch.equal(quantizer(tensor), tensor)
    assert int(observer.counts.sum()) == 2


def test_histograms_of_different_size_do_not_merge() -> None:
    with pytest.raises(DataError, match="64 and of 128 bins"):
        HistogramObserver(64).merge(HistogramObserver(128))


@pytest.mark.parametrize("bins", [0, -4, 2, 12, 1000])
def test_a_number_of_bins_that_is_no_power_of_two_is_refused(bins: int) -> None:
    with pytest.raises(ConfigError, match=f"received {bins}"):
        HistogramObserver(bins)
