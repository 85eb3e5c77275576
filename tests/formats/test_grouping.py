# SPDX-License-Identifier: Apache-2.0
"""Cutting tensors into groups and putting them together again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.formats.grouping import Grouping
from modewright.formats.integer import IntegerFormat
from modewright.quantization.algorithms.max import max_scale

INT8 = IntegerFormat(8, signed=True)
shapes = st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple)
PER_TENSOR = Grouping("tensor")
PER_TOKEN = Grouping("token")


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(1.0, math.prod(shape) + 1).reshape(shape)


@st.composite
def groupings(draw: st.DrawFn) -> tuple[Grouping, tuple[int, ...]]:
    shape = draw(shapes)
    axis = draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    granularity = draw(st.sampled_from(["tensor", "channel", "group", "block", "token"]))
    size = draw(st.integers(1, 9)) if granularity == "group" else None
    tile = draw(st.tuples(st.integers(1, 4), st.integers(1, 9))) if granularity == "block" else None
    return Grouping(granularity, size, axis, tile), shape  # type: ignore[arg-type]


@given(case=groupings())
def test_join_is_the_inverse_of_split(case: tuple[Grouping, tuple[int, ...]]) -> None:
    grouping, shape = case
    tensor = numbered(shape)
    grouped = grouping.split(tensor)
    assert grouped.ndim == 3
    assert torch.equal(grouping.join(grouped, tensor.shape), tensor)


@given(case=groupings())
def test_scales_have_the_documented_shape(case: tuple[Grouping, tuple[int, ...]]) -> None:
    grouping, shape = case
    of_tokens = grouping.channel_axis is None
    channels = math.prod(shape[:-1]) if of_tokens else shape[grouping.channel_axis]
    inputs = shape[-1] if of_tokens else math.prod(shape) // channels if channels else 0
    high, wide = grouping.block_size or (1, 1)
    expected = {
        "tensor": (1, 1),
        "channel": (channels, 1),
        "group": (channels, math.ceil(inputs / (grouping.group_size or 1))),
        "block": (math.ceil(channels / high), math.ceil(inputs / wide)),
        "token": (math.prod(shape[:-1]), 1),
    }[grouping.granularity]
    scale, _ = max_scale(grouping.split(numbered(shape)), INT8)
    assert tuple(scale.shape) == expected
    assert grouping.scale_shape(torch.Size(shape)) == expected


@given(shape=shapes.filter(math.prod), axis=st.integers(0, 3))
def test_a_channel_holds_the_values_at_one_index_of_its_axis(
    shape: tuple[int, ...], axis: int
) -> None:
    axis %= len(shape)
    tensor = numbered(shape)
    rows = Grouping("channel", channel_axis=axis).split(tensor)
    for index in range(shape[axis]):
        assert torch.equal(rows[index, 0], tensor.select(axis, index).flatten())


def test_groups_run_along_the_inputs_and_the_last_is_padded_with_zeros() -> None:
    groups = Grouping("group", 3).split(numbered((2, 5)))
    assert groups.tolist() == [[[1, 2, 3], [4, 5, 0]], [[6, 7, 8], [9, 10, 0]]]


def test_padding_does_not_widen_the_range_of_the_last_group() -> None:
    scale, _ = max_scale(Grouping("group", 4).split(torch.full((1, 5), 127.0)), INT8)
    assert scale.tolist() == [[1.0, 1.0]]


def test_a_group_size_beyond_the_inputs_makes_one_group_per_channel() -> None:
    scale, _ = max_scale(Grouping("group", 100).split(numbered((3, 5))), INT8)
    per_channel, _ = max_scale(Grouping("channel").split(numbered((3, 5))), INT8)
    assert torch.equal(scale, per_channel)


def test_a_token_is_the_last_axis() -> None:
    tokens = PER_TOKEN.split(numbered((2, 3, 4)))
    assert tokens.shape == (6, 1, 4)
    assert torch.equal(tokens[4, 0], numbered((2, 3, 4))[1, 1])


def test_a_tile_is_so_many_channels_by_so_many_inputs() -> None:
    tiles = Grouping("block", block_size=(2, 3)).split(numbered((4, 6)))
    assert tiles.shape == (2, 2, 6)
    assert tiles[1, 0].tolist() == [13, 14, 15, 19, 20, 21]


def test_tiles_that_are_not_full_are_padded_with_zeros() -> None:
    tiles = Grouping("block", block_size=(2, 3)).split(numbered((3, 4)))
    assert tiles[1].tolist() == [[9, 10, 11, 0, 0, 0], [12, 0, 0, 0, 0, 0]]


def test_tiles_of_a_convolution_are_cut_from_channels_by_inputs_and_kernel() -> None:
    kernel = numbered((2, 3, 2, 2))
    for axis in (0, 1):
        rows = kernel.transpose(0, axis).flatten(1)
        tiles = Grouping("block", channel_axis=axis, block_size=(2, 4)).split(kernel)
        assert torch.equal(tiles, Grouping("block", block_size=(2, 4)).split(rows))


def test_without_channels_groups_and_tiles_are_cut_from_tokens() -> None:
    tokens = numbered((2, 3, 4))
    groups = Grouping("group", 2, channel_axis=None).split(tokens)
    assert torch.equal(groups, tokens.reshape(6, 2, 2))
    tiles = Grouping("block", channel_axis=None, block_size=(6, 4)).split(tokens)
    assert torch.equal(tiles, tokens.reshape(1, 1, 24))


@pytest.mark.parametrize(
    "grouping",
    [
        PER_TENSOR,
        PER_TOKEN,
        Grouping("channel"),
        Grouping("group", 2),
        Grouping("block", block_size=(2, 2)),
        Grouping("group", 2, channel_axis=None),
    ],
    ids=lambda g: f"{g.granularity} of {g.channel_axis}",
)
def test_a_tensor_without_axes_is_one_value(grouping: Grouping) -> None:
    single = torch.tensor(3.0)
    grouped = grouping.split(single)
    assert grouped.flatten()[0] == 3
    assert tuple(grouped.shape[:2]) == grouping.scale_shape(single.shape) == (1, 1)
    assert torch.equal(grouping.join(grouped, single.shape), single)


@pytest.mark.parametrize(
    "grouping",
    [PER_TENSOR, PER_TOKEN, Grouping("channel"), Grouping("group", 2)],
    ids=lambda g: g.granularity,
)
def test_splitting_a_contiguous_tensor_copies_nothing(grouping: Grouping) -> None:
    tensor = numbered((4, 6))
    assert grouping.split(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    "grouping",
    [
        PER_TENSOR,
        PER_TOKEN,
        Grouping("channel", channel_axis=1),
        Grouping("group", 4),
        Grouping("block", block_size=(2, 4)),
    ],
    ids=lambda g: g.granularity,
)
def test_tensors_with_other_strides_are_cut_the_same_way(grouping: Grouping) -> None:
    tensor = numbered((6, 5)).t()
    assert torch.equal(grouping.split(tensor), grouping.split(tensor.contiguous()))
    assert torch.equal(grouping.join(grouping.split(tensor), tensor.shape), tensor)
