# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modewright.errors import MatchError
from modewright.pruning.depth.blocks import (
    choose_blocks,
    make_plain,
    make_skippable,
    noting_parts,
    remove_blocks,
    removed,
    skip_blocks,
    skippable_blocks,
    skipped_blocks,
)
from support.models import Block


class Numbered(Block):
    """A block that knows its place, and puts out a tuple."""

    def __init__(self, features: int, place: int) -> None:
        super().__init__(features, 2 * features)
        self.fc2.layer_idx = place
        self.width = 0  # the same number in the first block only

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


class Stack(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Numbered(4, place) for place in range(blocks)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return x


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


X = torch.linspace(-1, 1, 8).reshape(2, 4)
PATHS = ["layers.0", "layers.1", "layers.2", "layers.3"]


def open_stack(stack: Stack) -> Stack:
    make_skippable(stack, choose_blocks(stack, ["*"], [])[0])
    with noting_parts(stack):
        stack(X)
    return stack


def test_open_space_computes_what_the_model_did_with_the_same_keys(stack: Stack) -> None:
    expected, keys = stack(X), list(stack.state_dict())

    open_stack(stack)

    assert torch.equal(stack(X), expected)
    assert list(stack.state_dict()) == keys
    assert all(isinstance(layer, Numbered) for layer in stack.layers)


def test_skipping_removing_for_trial_and_removing_for_good_compute_the_same(stack: Stack) -> None:
    by_hand = copy.deepcopy(stack)
    by_hand.layers = nn.ModuleList([stack.layers[0], stack.layers[2]])
    expected = by_hand(X)
    open_stack(stack)

    with removed(stack, ["layers.1", "layers.3"]):
        assert torch.equal(stack(X), expected)
    assert len(stack.layers) == 4
    skip_blocks(stack, ["layers.1", "layers.3"])
    assert skipped_blocks(stack) == ["layers.1", "layers.3"]
    assert torch.equal(stack(X), expected)
    make_plain(stack)
    remove_blocks(stack, ["layers.1", "layers.3"])

    assert torch.equal(stack(X), expected)
    assert [type(layer) for layer in stack.layers] == [Numbered, Numbered]
    assert not skippable_blocks(stack)


def test_blocks_that_move_up_know_their_new_place(stack: Stack) -> None:
    remove_blocks(stack, ["layers.0", "layers.2"])

    assert [layer.fc2.layer_idx for layer in stack.layers] == [0, 1]
    assert [layer.width for layer in stack.layers] == [0, 0]
    assert list(dict(stack.named_children())["layers"]._modules) == ["0", "1"]


def test_a_block_of_a_sequential_with_other_layers_is_removed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Block(4, 8), Block(4, 8), nn.Linear(4, 2))
    expected = model[3](model[2](model[0](X)))
    parts, _ = choose_blocks(model, ["*"], [])

    remove_blocks(model, ["1"])

    assert list(parts) == ["1", "2"]
    assert torch.equal(model(X), expected)


def test_patterns_pick_blocks_and_the_others_are_listed_with_the_reason(stack: Stack) -> None:
    parts, skipped = choose_blocks(stack, ["layers.[0-2]"], ["layers.0"])

    assert list(parts) == ["layers.1", "layers.2"]
    assert skipped == [
        {"module": "layers.0", "reason": "`ignore` names it"},
        {"module": "layers.3", "reason": "`targets` do not name it"},
    ]


def test_a_pattern_without_a_match_is_an_error(stack: Stack) -> None:
    with pytest.raises(MatchError, match=r"layer\.9"):
        choose_blocks(stack, ["layer.9"], [])


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(MatchError, match="no block that could be dropped"):
        choose_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), ["*"], [])


def test_blocks_that_are_attributes_or_shared_stay() -> None:
    shared = Block(4, 8)
    model = nn.ModuleDict(
        {
            "pair": nn.ModuleList([shared, Block(4, 8)]),
            "again": nn.ModuleList([shared, Block(4, 8)]),
        }
    )
    parts, skipped = choose_blocks(model, ["*"], [])

    assert "pair.0" not in parts
    assert {"module": "pair.0", "reason": "the network holds it in several places"} in skipped
