# SPDX-License-Identifier: Apache-2.0
"""What a model would weigh with its weights packed."""

from __future__ import annotations

import pytest
from torch import nn

import modewright
from modewright.quantization.size import packed_bytes


def packed(model: nn.Module) -> int:
    return packed_bytes(model, modewright.mode_state(model)["modes"][0]["metadata"]["layers"])


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 10), nn.LayerNorm(10))


NORM = 2 * 10 * 4
BIAS = 10 * 4


@pytest.mark.parametrize(
    ("scheme", "weights"),
    [
        ("w8a16", 1000 + 10 * 2),
        ("w8a8", 1000 + 10 * 2),
        ("w4a16", 500 + 10 * 2 * 2),  # 100 inputs are two groups of 64
    ],
)
def test_weights_scales_and_the_rest_are_counted(scheme: str, weights: int) -> None:
    model = modewright.quantize(linear(), scheme)

    assert packed(model) == weights + BIAS + NORM
    assert packed(modewright.apply_mode(model, "export_quantize")) == weights + BIAS + NORM


def test_zero_points_are_counted() -> None:
    rule = {"targets": ["0"], "weights": {"symmetric": False}}
    model = modewright.quantize(linear(), "w8a16", config={"rules": [rule]})

    assert packed(model) == 1000 + 10 * (2 + 1) + BIAS + NORM


def test_a_tied_weight_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    model[1].weight = model[0].weight

    assert packed(modewright.quantize(model, "w8a16")) == 100 + 10 * 2
