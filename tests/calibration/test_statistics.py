# SPDX-License-Identifier: Apache-2.0
"""Statistics: what two halves of the data merge to is what the whole gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.calibration.statistics import MergeRule, RangeObserver, Statistic

RULES: tuple[MergeRule, ...] = ("max", "min", "sum")
# Whole numbers add up exactly in whatever order.
numbers = st.integers(-(2**15), 2**15).map(float)
vectors = st.lists(numbers, min_size=3, max_size=3)
batches = st.lists(st.lists(numbers, max_size=4), max_size=6)


def gathered(rule: MergeRule, values: list[list[float]]) -> Statistic:
    statistic = Statistic(rule)
    for value in values:
        statistic.update(torch.tensor(value))
    return statistic


def observed(values: list[list[float]]) -> RangeObserver:
    observer = RangeObserver()
    for value in values:
        observer.update(torch.tensor(value))
    return observer


@pytest.mark.parametrize("rule", RULES)
@given(values=st.lists(vectors, min_size=1, max_size=6), cut=st.integers(0, 6))
def test_halves_merge_to_the_whole(rule: MergeRule, values: list[list[float]], cut: int) -> None:
    half = gathered(rule, values[:cut])
    half.merge(gathered(rule, values[cut:]))
    whole = gathered(rule, values).value
    expected = {"max": torch.amax, "min": torch.amin, "sum": torch.sum}[rule](
        torch.tensor(values), dim=0
    )
    assert whole is not None
    assert torch.equal(whole, expected)
    assert half.value is not None
    assert torch.equal(half.value, whole)


@pytest.mark.parametrize("rule", RULES)
def test_a_statistic_without_data_has_no_value(rule: MergeRule) -> None:
    empty = Statistic(rule)
    empty.merge(Statistic(rule))
    assert empty.value is None


@pytest.mark.parametrize("rule", RULES)
def test_merging_leaves_the_other_one_alone(rule: MergeRule) -> None:
    first, second = gathered(rule, [[1.0, 5.0, 2.0]]), gathered(rule, [[4.0, 3.0, 2.0]])
    first.merge(second)
    assert second.value is not None
    assert second.value.tolist() == [4.0, 3.0, 2.0]


def test_a_statistic_keeps_no_graph() -> None:
    statistic = Statistic("sum")
    statistic.update(torch.ones(2, requires_grad=True) * 2)
    assert statistic.value is not None
    assert not statistic.value.requires_grad


@given(values=batches, cut=st.integers(0, 6))
def test_observers_of_halves_merge_to_the_observer_of_the_whole(
    values: list[list[float]], cut: int
) -> None:
    half = observed(values[:cut])
    half.merge(observed(values[cut:]))
    flat = [number for batch in values for number in batch]
    for observer in (half, observed(values)):
        if not flat:
            assert observer.range is None
            assert observer.count.value is None
        else:
            assert observer.range is not None
            assert [bound.item() for bound in observer.range] == [min(flat), max(flat)]
            assert observer.count.value == len(flat)


def test_an_empty_tensor_counts_for_nothing() -> None:
    observer = observed([[2.0, -1.0]])
    observer.update(torch.empty(0, 4))
    assert observer.range is not None
    assert [bound.item() for bound in observer.range] == [-1.0, 2.0]
    assert observer.count.value == 2


def test_nan_is_seen_in_whatever_batch_it_was() -> None:
    for values in ([[math.nan], [1.0]], [[1.0], [math.nan]]):
        seen = observed(values).range
        assert seen is not None
        assert all(bound.isnan() for bound in seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_range_has_the_dtype_of_what_was_seen(dtype: torch.dtype) -> None:
    observer = RangeObserver()
    observer.update(torch.tensor([[0.5, -2.0]], dtype=dtype))
    assert observer.range is not None
    assert [bound.dtype for bound in observer.range] == [dtype, dtype]
    assert [bound.item() for bound in observer.range] == [-2.0, 0.5]
