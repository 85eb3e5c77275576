# SPDX-License-Identifier: Apache-2.0
"""What a model would weigh with its weights packed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import modewright
from modewright.quantization.size import packed_bytes


def packed(model: nn.Module) -> int:
    return packed_bytes(model, modewright.mode_state(model)["modes"][0]["metadata"]["layers"])


@pytest.mark.parametrize(
    ("layer", "scheme", "bits"),
    [
        pytest.param(lambda: nn.Linear(128, 4, bias=False), "w8a8", 512 * 8 + 4 * 32, id="w8a8"),
        pytest.param(lambda: nn.Linear(130, 4, bias=False), "w4a16", 520 * 4 + 12 * 16, id="w4a16"),
        pytest.param(lambda: nn.Linear(64, 4), "w8a16", 256 * 8 + 4 * 32 + 4 * 32, id="bias"),
        pytest.param(
            lambda: nn.ConvTranspose1d(8, 4, 2, bias=False), "w8a16", 64 * 8 + 4 * 32, id="up"
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
    assert packed(model) == 256 + 4


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 10, bias=False))
    model[1].weight = model[0].weight
    modewright.quantize(model, "w8a16", config={"targets": ["Embedding", "Linear"]})
    assert packed(model) == 640 + 10 * 4


def test_layers_that_are_not_quantized_count_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 4, bias=False))
    modewright.quantize(model, "w8a16", config={"ignore": ["1"]})
    assert packed(model) == (256 + 4 * 4) + 64


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        pytest.param("nvfp4_w4a16", 4 * (128 * 4 + 8 * 8) + 32, id="a scale of the tensor beside"),
        pytest.param("mxfp4_w4a16", 4 * (128 * 4 + 4 * 8), id="powers of two have 8 bits"),
        pytest.param("mxfp6", 4 * (128 * 6 + 4 * 8), id="six bits"),
        pytest.param("fp8_block", 4 * 128 * 8 + 32, id="tiles"),
        pytest.param("w2a16", 4 * (128 * 2 + 2 * (16 + 2)), id="two bits and zero points"),
    ],
)
def test_every_format_and_granularity_is_counted(scheme: str, bits: int) -> None:
    model = nn.Sequential(nn.Linear(128, 4, bias=False))
    modewright.quantize(model, scheme)
    assert packed(model) == bits // 8


@pytest.mark.parametrize(
    ("layer", "weights", "channels", "rest"),
    [
        pytest.param(lambda: nn.LSTM(6, 5), 20 * (6 + 5), 2 * 20, 2 * 20, id="recurrent"),
        pytest.param(
            lambda: nn.MultiheadAttention(8, 2), 4 * 8 * 8, 4 * 8, 4 * 8, id="attention"
        ),
        pytest.param(
            lambda: nn.MultiheadAttention(8, 2, kdim=4, bias=False),
            8 * (8 + 4 + 8 + 8), 4 * 8, 0, id="projections",
        ),
    ],
)  # fmt: skip
def test_every_quantized_parameter_is_counted(
    layer: Callable[[], nn.Module], weights: int, channels: int, rest: int
) -> None:
    model = nn.Sequential(layer())
    modewright.quantize(model, "w8a16")
    assert packed(model) == weights + channels * 4 + rest * 4
    modewright.apply_mode(model, "export_quantize")
    assert packed(model) == weights + channels * 4 + rest * 4


def test_a_low_rank_branch_counts_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(64, 4, bias=False))
    modewright.quantize(model, "w8a16")
    before = packed(model)
    model[0].low_rank_up, model[0].low_rank_down = torch.zeros(4, 2), torch.zeros(2, 64)
    assert packed(model) == before + 4 * (8 + 128)


def test_keys_and_values_weigh_nothing() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    plain = sum(p.numel() * 4 for p in model.parameters())
    modewright.quantize(model, "kv8")
    assert packed(model) == plain


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_asym", "w3a16", "nvfp4", "mxfp6", "fp8_block"])
def test_what_is_estimated_is_what_packing_gives(scheme: str) -> None:
    model = nn.Sequential(nn.Embedding(10, 128), nn.Linear(128, 10, bias=False), nn.Linear(10, 4))
    model[1].weight = model[0].weight
    modewright.quantize(model, scheme, config={"targets": ["Embedding", "1"]})
    expected = packed(model)
    modewright.apply_mode(model, "compress")

    assert packed(model) == expected
    assert modewright.inspect(model).bytes == expected
