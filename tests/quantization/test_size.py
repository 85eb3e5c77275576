# SPDX-License-Identifier: Apache-2.0
"""What a model would weigh with its weights packed."""

from __future__ import annotations

import pytest
from torch import nn

import modewright
from modewright.quantization.size import packed_bytes


def packed(model: nn.Module) -> int:
    return packed_bytes(model, modewright.mode_state(model)["modes"][0]["metadata"]["layers"])


@pytest.mark.parametrize(
    ("layer", "scheme", "bits"),
    [
        pytest.param(lambda: nn.Linear(128, 4, bias=False), "w8a8", 512 * 8 + 4 * 16, id="w8a8"),
        pytest.param(lambda: nn.Linear(130, 4, bias=False), "w4a16", 520 * 4 + 12 * 16, id="w4a16"),
        pytest.param(lambda: nn.Linear(64, 4), "w8a16", 256 * 8 + 4 * 16 + 4 * 32, id="bias"),
        pytest.param(
            lambda: nn.ConvTranspose1d(8, 4, 2, bias=False), "w8a16", 64 * 8 + 4 * 16, id="up"
        ),
    ],
)
def test_weights_scales_and_the_rest_are_counted(layer, scheme: str, bits: int) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(layer())
    modewright.quantize(model, scheme)
    assert packed(model) == bits // 8
    modewright.apply_mode(model, "export_quantize")
    assert packed(model) == bits // 8


def test_zero_points_take_as_many_bits_as_a_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 4, bias=False))
    rules = [{"targets": ["0"], "weights": {"symmetric": False}}]
    modewright.quantize(model, "w4a16", config={"rules": rules})
    assert packed(model) == (256 * 4 + 4 * (16 + 4)) // 8


def test_one_scale_for_a_tensor_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(64, 4, bias=False))
    rules = [{"targets": ["0"], "weights": {"granularity": "tensor"}}]
    modewright.quantize(model, "w8a16", config={"rules": rules})
    assert packed(model) == 256 + 2


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 10, bias=False))
    model[1].weight = model[0].weight
    modewright.quantize(model, "w8a16", config={"targets": ["Embedding", "Linear"]})
    assert packed(model) == 640 + 10 * 2


def test_layers_that_are_not_quantized_count_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 4, bias=False))
    modewright.quantize(model, "w8a16", config={"ignore": ["1"]})
    assert packed(model) == (256 + 4 * 2) + 64
