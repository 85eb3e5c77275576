# SPDX-License-Identifier: Apache-2.0
"""Cutting tensors into groups and putting them together again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.formats.grouping import Granularity, Grouping

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "group"])
@given(shape=shapes, group_size=st.integers(1, 7), data=st.data())
def test_joining_undoes_splitting(
    granularity: Granularity, shape: list[int], group_size: int, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    size = group_size if granularity == "group" else None
    grouping = Grouping(granularity, size, axis)
    tensor = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)

    grouped = grouping.split(tensor)

    assert grouped.ndim == 3
    assert torch.equal(grouping.join(grouped, tensor.shape), tensor)


@pytest.mark.parametrize(
    ("grouping", "shape", "grouped"),
    [
        (Grouping("tensor"), (4, 6), (1, 1, 24)),
        (Grouping("token"), (2, 3, 6), (6, 1, 6)),
        (Grouping("channel"), (4, 6), (4, 1, 6)),
        (Grouping("channel", channel_axis=1), (4, 6, 3), (6, 1, 12)),
        (Grouping("group", 4), (5, 6), (5, 2, 4)),
        (Grouping("group", 3), (5, 2, 3), (5, 2, 3)),
    ],
    ids=["tensor", "token", "channel", "other axis", "last group not full", "convolution"],
)
def test_what_shares_a_scale(
    grouping: Grouping, shape: tuple[int, ...], grouped: tuple[int, ...]
) -> None:
    assert tuple(grouping.split(torch.zeros(shape)).shape) == grouped


def test_a_group_that_is_not_full_is_padded_with_zeros() -> None:
    grouped = Grouping("group", 4).split(torch.full((2, 6), 9.0))

    assert grouped[0].tolist() == [[9, 9, 9, 9], [9, 9, 0, 0]]


def test_a_group_holds_inputs_of_one_output_channel() -> None:
    weight = torch.arange(12.0).reshape(2, 3, 2)  # a transposed convolution: [in, out, kernel]

    grouped = Grouping("group", 2, channel_axis=1).split(weight)

    assert grouped[1].tolist() == [[2, 3], [8, 9]]
