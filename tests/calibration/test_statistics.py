# SPDX-License-Identifier: Apache-2.0
"""Statistics merge: two halves of the data give what the whole gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.calibration.statistics import MergeRule, RangeObserver, Statistic

batches = st.lists(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=5), min_size=2, max_size=6
)


@pytest.mark.parametrize("rule", ["max", "min", "sum"])
@given(values=st.lists(st.integers(-1000, 1000), min_size=1, max_size=8), cut=st.integers(0, 8))
def test_halves_merge_to_the_whole(rule: MergeRule, values: list[int], cut: int) -> None:
    whole, first, second = Statistic(rule), Statistic(rule), Statistic(rule)
    for value in values:
        whole.update(torch.tensor(value))
    for value in values[:cut]:
        first.update(torch.tensor(value))
    for value in values[cut:]:
        second.update(torch.tensor(value))

    first.merge(second)

    assert first.value is not None
    assert first.value.item() == {"max": max, "min": min, "sum": sum}[rule](values)
    assert whole.value is not None
    assert torch.equal(first.value, whole.value)


@given(data=batches)
def test_observers_of_halves_merge_to_the_observer_of_the_whole(data: list[list[int]]) -> None:
    whole, first, second = RangeObserver(), RangeObserver(), RangeObserver()
    for index, batch in enumerate(data):
        whole.update(torch.tensor(batch, dtype=torch.float32))
        (first if index % 2 else second).update(torch.tensor(batch, dtype=torch.float32))

    first.merge(second)

    flat = [value for batch in data for value in batch]
    assert whole.range is not None
    assert [bound.item() for bound in whole.range] == [min(flat), max(flat)]
    assert first.range == whole.range
    assert first.count.value == whole.count.value == len(flat)


def test_an_empty_tensor_counts_for_nothing() -> None:
    observer = RangeObserver()
    observer.update(torch.empty(0, 4))
    assert observer.range is None

    observer.merge(RangeObserver())
    assert observer.range is None


def test_an_observer_keeps_no_graph() -> None:
    observer = RangeObserver()
    observer.update(torch.ones(2, requires_grad=True) * 2)

    assert observer.range is not None
    assert not any(bound.requires_grad for bound in observer.range)
