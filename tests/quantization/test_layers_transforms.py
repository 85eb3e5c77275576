# SPDX-License-Identifier: Apache-2.0
"""The weight as a matrix, and what is done to inputs so that they quantize well."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.quantization.algorithms.hadamard import hadamard_matrix, rotate_last
from modewright.quantization.convert import ACTIVATIONS_DROPPED, TRANSFORMS_FOLDED
from modewright.quantization.layers import QuantizedLayer, insert_quantizers
from modewright.quantization.representation import SchemeConfig
from modewright.quantization.schemes import SCHEMES


class OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.t() + self.bias


PRODUCTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (2, 3, 8)),
    "linear without bias on one vector": (lambda: nn.Linear(8, 6, bias=False), (8,)),
    "own forward": (lambda: OwnForward(8, 6), (3, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding="same", dilation=2), (2, 8, 7)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (3, 2), stride=2, padding=1, dilation=(2, 1)), (2, 8, 7, 7)),
    "conv2d reflect": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), (2, 8, 5, 5)),
    "conv2d without batch": (lambda: nn.Conv2d(8, 6, 3), (8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(8, 6, 2), (1, 8, 3, 3, 3)),
}
CASES = [pytest.param(make, shape, id=name) for name, (make, shape) in PRODUCTS.items()]
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "groups": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "embedding": lambda: nn.Embedding(6, 4),
    "bilinear": lambda: nn.Bilinear(4, 5, 6),
}


def made(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    return nn.Sequential(make()), torch.randn(shape)


def transform(layer: QuantizedLayer, *, rank: int = 0) -> None:
    """Scale and rotate the input, change the weight so that the layer computes what it did."""
    scale = torch.linspace(0.5, 2, 8)
    weight = rotate_last(layer.weight.detach().movedim(1, -1) / scale, 8).movedim(-1, 1)
    layer.weight = nn.Parameter(weight.contiguous())
    layer.pre_quant_scale, layer.hadamard_size = scale, 8
    if rank:
        left, values, right = torch.linalg.svd(layer.weight_matrix(weight), full_matrices=False)
        layer.low_rank_up = (left[:, :rank] * values[:rank]).contiguous()
        layer.low_rank_down = right[:rank].contiguous()


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_rows_times_the_matrix_are_the_outputs(make: Any, shape: tuple[int, ...]) -> None:
    model, x = made(make, shape)
    layer = insert_quantizers(model[0], SchemeConfig(weights=SCHEMES["w8a16"].weights))
    layer.weight_quantizer.enabled = False
    bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (-layer.feature_axis - 1))
    expected = model(x) - bias
    rows = layer.input_rows(x)
    assert layer.has_rows
    assert rows.shape[1] == 8 * layer.columns_per_feature
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    products = rows @ layer.weight_matrix(layer.weight).t()
    places = expected.movedim(layer.feature_axis, -1).reshape(-1, 6)
    torch.testing.assert_close(products, places)


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_layers_say_that_they_have_no_rows(make: Callable[[], nn.Module]) -> None:
    layer = insert_quantizers(make(), SCHEMES["w8a16"])
    assert not layer.has_rows
    assert layer.input_rows(torch.zeros(1, 4, 4)) is None


@pytest.mark.parametrize(
    "make",
    [make for make, _ in PRODUCTS.values()] + list(OTHERS.values()),
    ids=[*PRODUCTS, *OTHERS],
)
def test_a_matrix_goes_back_into_the_shape_of_the_weight(make: Callable[[], nn.Module]) -> None:
    layer = insert_quantizers(make(), SCHEMES["w8a16"])
    matrix = layer.weight_matrix(layer.weight)
    assert matrix.ndim == 2
    assert matrix.shape[0] == layer.weight.shape[layer.channel_axis]
    back = layer.from_matrix(matrix)
    assert torch.equal(back, layer.weight)
    assert back.is_contiguous()


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_scale_and_rotation_do_not_change_what_is_computed(
    make: Any, shape: tuple[int, ...]
) -> None:
    model, x = made(make, shape)
    expected = model(x)
    layer = insert_quantizers(model[0], SchemeConfig())
    transform(layer, rank=2)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_the_input_is_scaled_and_rotated_before_it_is_quantized() -> None:
    model, x = made(*PRODUCTS["linear"])
    modewright.quantize(model, "w8a8")
    transform(model[0])
    expected = (x * model[0].pre_quant_scale) @ hadamard_matrix(8, torch.float32)
    torch.testing.assert_close(model[0].transformed_input(x), expected)
    assert torch.equal(model[0].quantized_input(x), model[0].input_quantizer(expected))


def test_a_low_rank_branch_takes_what_is_left_out_of_the_quantized_weight() -> None:
    model, x = made(*PRODUCTS["linear"])
    modewright.apply_mode(model, ("quantize", {"scheme": "w4a8"}))
    layer = model[0]
    transform(layer, rank=2)
    branch = layer.low_rank_up @ layer.low_rank_down
    assert torch.equal(layer.to_quantize(), layer.weight - branch)
    low, seen = layer.quantized_input(x), layer.transformed_input(x)
    expected = low @ layer.quantized_weight().t() + seen @ branch.t() + layer.bias
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(layer.quantized_weight(), layer.weight_quantizer(layer.weight - branch))


@pytest.mark.parametrize(("make", "shape"), CASES)
@pytest.mark.parametrize("rank", [0, 2])
def test_folding_takes_scale_rotation_and_branch_into_a_plain_weight(
    make: Any, shape: tuple[int, ...], rank: int
) -> None:
    model, x = made(make, shape)
    cls, keys = type(model[0]), list(model.state_dict())
    modewright.apply_mode(model, ("quantize", {"scheme": "w8a16"}))
    transform(model[0], rank=rank)
    expected = model(x)
    modewright.apply_mode(model, "export_quantize")
    assert type(model[0]) is cls
    assert list(model.state_dict()) == keys
    assert "hadamard_size" not in vars(model[0])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert modewright.mode_state(model)["modes"][-1]["metadata"]["skipped"] == []


@pytest.mark.parametrize("transformed", [False, True])
def test_folding_says_what_the_inputs_lose(transformed: bool) -> None:
    model, x = made(*PRODUCTS["linear"])
    original = copy.deepcopy(model)(x)
    modewright.apply_mode(model, ("quantize", {"scheme": "w8a8"}))
    if transformed:
        transform(model[0])
    modewright.apply_mode(model, "export_quantize")
    skipped = modewright.mode_state(model)["modes"][-1]["metadata"]["skipped"]
    reason = TRANSFORMS_FOLDED if transformed else ACTIVATIONS_DROPPED
    assert skipped == [{"module": "0", "reason": reason}]
    assert (model(x) - original).norm() / original.norm() < 0.02


def test_a_tied_weight_that_was_transformed_for_one_layer_is_folded_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 6, bias=False))
    model[1].weight = model[0].weight
    modewright.quantize(model, "w8a16", config={"targets": ["Embedding", "Linear"]})
    model[1].hadamard_size = 8
    ids = torch.arange(6)
    expected = model(ids)
    modewright.apply_mode(model, "export_quantize")
    torch.testing.assert_close(model(ids), expected)


def test_buffers_are_in_the_state_dict_only_when_they_are_set() -> None:
    model, _ = made(*PRODUCTS["linear"])
    modewright.apply_mode(model, ("quantize", {"scheme": "w8a16"}))
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert model[0].transforms() == {}
    transform(model[0], rank=2)
    recorded = model[0].transforms()
    assert recorded == {
        "pre_quant_scale": [8],
        "low_rank_down": [2, 8],
        "low_rank_up": [6, 2],
        "hadamard_size": 8,
    }
    other, x = made(*PRODUCTS["linear"])
    modewright.apply_mode(other, ("quantize", {"scheme": "w8a16"}))
    other[0].allocate_transforms(recorded)
    assert other[0].low_rank_up.isnan().all()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_half_precision_stays_half_precision() -> None:
    model, x = made(*PRODUCTS["conv2d"])
    modewright.quantize(model.to(torch.bfloat16), "w4a16")
    transform(model[0], rank=2)
    model[0].pre_quant_scale = model[0].pre_quant_scale.float()
    model.to(torch.bfloat16)
    assert model(x.bfloat16()).dtype == torch.bfloat16
