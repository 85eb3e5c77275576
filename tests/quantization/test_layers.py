# SPDX-License-Identifier: Apache-2.0
"""Quantized layers compute what plain ones do with the quantized weight and input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modewright
from modewright.errors import ConfigError
from modewright.quantization.layers import QUANTIZED_CLASSES, QuantizedLayer, insert_quantizers
from modewright.quantization.schemes import SCHEMES

IDS = torch.tensor([[0, 2, 2], [5, 1, 0]])
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear without bias on tokens": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "linear on one vector": (lambda: nn.Linear(6, 4), (6,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 8)),
    "conv1d reflect": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, (3, 1), groups=2, dilation=2), (2, 4, 7, 7)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 7, 7)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (1, 4, 7, 7)),
    "conv2d without batch": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1, groups=2), (1, 2, 4, 4, 4)),
    "conv3d circular": (
        lambda: nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular"),
        (1, 2, 4, 4, 4),
    ),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 5, 5),
    ),
    "conv_transpose2d dilated": (lambda: nn.ConvTranspose2d(4, 6, 2, dilation=2), (2, 4, 5, 5)),
    "conv_transpose3d": (
        lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, bias=False),
        (1, 2, 3, 3, 3),
    ),
}
CASES = [pytest.param(make, shape, id=name) for name, (make, shape) in LAYERS.items()]
UP = [pytest.param(make, shape, id=n) for n, (make, shape) in LAYERS.items() if "transpose" in n]


def seeded(make: Callable[[], nn.Module]) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(make())


def inputs(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2


def rounded(tensor: torch.Tensor, amax: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Quantize symmetrically with that range, and back."""
    largest = 2 ** (bits - 1) - 1
    scale = amax / largest
    return (tensor / scale).round().clamp(-largest - 1, largest) * scale


def rounded_weight(layer: nn.Module, bits: int = 8) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.detach()  # type: ignore[assignment, operator]
    channels = 1 if "Transpose" in type(layer).__name__ else 0
    others = [axis for axis in range(weight.ndim) if axis != channels]
    return rounded(weight, weight.abs().amax(dim=others, keepdim=True), bits)


def rounded_input(layer: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return rounded(tensor, tensor.abs().amax(dim=-1, keepdim=True))
    return rounded(tensor, tensor.abs().max())


def with_weight(layer: nn.Module, weight: torch.Tensor) -> nn.Module:
    plain = copy.deepcopy(layer)
    plain.weight = nn.Parameter(weight)
    return plain


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_forward_is_that_of_the_plain_layer_on_rounded_weight_and_input(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = seeded(make), inputs(shape)
    expected = with_weight(model[0], rounded_weight(model[0]))(rounded_input(model[0], x))
    plain = model(x)
    modewright.quantize(model, "w8a8")
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(model(x), plain)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_weights_alone_can_be_rounded(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = seeded(make), inputs(shape)
    expected = with_weight(model[0], rounded_weight(model[0]))(x)
    modewright.quantize(model, "w8a16")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("make", "shape"), UP)
def test_transposed_convolutions_take_an_output_size(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = seeded(make), inputs(shape)
    smallest = list(model(x).shape[2:])
    stride = model[0].stride[0]
    size = [n + (stride > 1 and not model[0].output_padding[0]) for n in smallest]
    expected = with_weight(model[0], rounded_weight(model[0]))(x, output_size=size)
    modewright.quantize(model, "w8a16")
    assert torch.equal(model[0](x, output_size=size), expected)
    with pytest.raises(ValueError, match="output"):
        model[0](x, output_size=[n + 50 for n in size])


def test_a_linear_layer_computes_what_int8_kernels_do() -> None:
    model, x = seeded(lambda: nn.Linear(64, 32)), inputs((5, 64))
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    weight_scale = weight.abs().amax(dim=1) / 127
    input_scale = x.abs().amax(dim=1) / 127
    weight_codes = (weight / weight_scale[:, None]).round().to(torch.int8)
    input_codes = (x / input_scale[:, None]).round().to(torch.int8)
    sums = input_codes.int() @ weight_codes.int().t()
    expected = sums * input_scale[:, None] * weight_scale + bias
    modewright.quantize(model, "w8a8")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_groups_of_int4_are_each_rounded_with_their_own_scale() -> None:
    model, x = seeded(lambda: nn.Linear(150, 3)), inputs((4, 150))
    parts = model[0].weight.detach().split(64, dim=1)
    rounded_parts = [rounded(p, p.abs().amax(dim=1, keepdim=True), bits=4) for p in parts]
    expected = with_weight(model[0], torch.cat(rounded_parts, dim=1))(x)
    modewright.quantize(model, "w4a16")
    assert model[0].weight_quantizer.scale.shape == (3, 3)
    assert torch.equal(model(x), expected)


def test_unsigned_codes_cover_the_range_of_each_channel() -> None:
    model, x = seeded(lambda: nn.Linear(16, 3)), inputs((4, 16))
    with torch.no_grad():
        model[0].weight += 0.3
    weight = model[0].weight.detach()
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero_point = (-low / scale).round()
    codes = ((weight / scale).round() + zero_point).clamp(0, 255)
    expected = with_weight(model[0], (codes - zero_point) * scale)(x)
    rules = [{"targets": ["Linear"], "weights": {"symmetric": False}}]
    modewright.quantize(model, "w8a16", config={"rules": rules})
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "scheme"),
    [({}, "w8a16"), ({"padding_idx": 2}, "w8a8"), ({"max_norm": 0.5}, "w8a16")],
    ids=["plain", "padding_idx, and inputs are left alone", "max_norm"],
)
def test_embedding_looks_up_in_the_rounded_table(options: dict[str, Any], scheme: str) -> None:
    model = seeded(lambda: nn.Embedding(6, 4, **options))
    table = rounded(model[0].weight.detach(), model[0].weight.detach().abs().amax(1, keepdim=True))
    table = torch.nan_to_num(table)  # the row of padding_idx is zero
    expected = F.embedding(IDS, table.clone(), **options)
    before = model[0].weight.detach().clone()
    modewright.quantize(model, scheme, config={"targets": ["Embedding"]})
    assert model[0].input_quantizer is None
    assert torch.equal(model(IDS), expected)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_embedding_trains_and_its_padding_row_does_not(sparse: bool) -> None:
    model = seeded(lambda: nn.Embedding(6, 4, padding_idx=2, sparse=sparse))
    modewright.quantize(model, "w8a16", config={"targets": ["Embedding"]})
    model(IDS).sum().backward()
    gradient = model[0].weight.grad
    assert gradient[[0, 1, 5]].ne(0).all()
    assert gradient[[2, 3, 4]].eq(0).all()


def test_outputs_are_rounded_where_a_rule_says_so() -> None:
    model, x = seeded(lambda: nn.Linear(6, 4)), inputs((3, 6))
    plain = model(x).detach()
    rules = [{"targets": ["Linear"], "output_activations": {"granularity": "token",
                                                            "dynamic": True}}]  # fmt: skip
    modewright.apply_mode(model, [("quantize", {"scheme": "none", "rules": rules})])
    assert torch.equal(model(x), rounded(plain, plain.abs().amax(-1, keepdim=True)))


def test_a_convolution_has_one_scale_for_its_input_and_is_recorded_so() -> None:
    model = seeded(lambda: nn.Conv1d(4, 6, 3))
    modewright.quantize(model, "w8a8")
    assert model[0].input_quantizer.config.granularity == "tensor"
    recorded = modewright.mode_state(model)["modes"][0]["metadata"]["layers"]["0"]
    assert recorded["input_activations"]["granularity"] == "tensor"


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_isinstance_paths_and_keys_of_the_state_dict_stay(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = seeded(make)
    layer, cls, keys = model[0], type(model[0]), list(model.state_dict())
    weight, described = model[0].weight, repr(model[0])
    modewright.apply_mode(model, [("quantize", {"scheme": "w8a8"})])
    assert model[0] is layer
    assert isinstance(layer, cls)
    assert isinstance(layer, QuantizedLayer)
    assert layer.weight is weight
    assert list(model.state_dict()) == keys
    assert described.rstrip(")").split("(", 1)[1] in repr(layer)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_the_class_is_back_after_export(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = seeded(make)
    cls, keys, attributes = type(model[0]), list(model.state_dict()), set(vars(model[0]))
    modewright.quantize(model, "w8a8")
    modewright.apply_mode(model, "export_quantize")
    assert type(model[0]) is cls
    assert list(model.state_dict()) == keys
    assert set(vars(model[0])) == attributes
    assert not list(model[0].children())


@pytest.mark.parametrize("cls", QUANTIZED_CLASSES, ids=lambda cls: cls.__name__)
def test_every_supported_class_is_tried_here(cls: type[nn.Module]) -> None:
    tried = {type(make()) for make, _ in LAYERS.values()} | {nn.Embedding}
    elsewhere = {
        *(nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell),  # test_layers_forward
        *(nn.Bilinear, nn.EmbeddingBag),
        nn.MultiheadAttention,  # test_layers_attention
    }
    assert cls in tried | elsewhere


class Doubling(nn.Linear):
    """A subclass without a forward of its own."""

    def doubled(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self(x)


def test_a_subclass_without_its_own_forward_is_quantized_and_keeps_its_methods() -> None:
    model, x = seeded(lambda: Doubling(6, 4)), inputs((3, 6))
    modewright.quantize(model, "w8a8")
    assert isinstance(model[0], Doubling)
    assert isinstance(model[0], QuantizedLayer)
    assert torch.equal(model[0].doubled(x), 2 * model(x))
    modewright.apply_mode(model, "export_quantize")
    assert type(model[0]) is Doubling


def test_hooks_run_as_before() -> None:
    model, seen = seeded(lambda: nn.Linear(6, 4)), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(module))
    modewright.quantize(model, "w8a8")
    model(inputs((3, 6)))
    assert seen == [model[0]]


def test_quantizers_have_the_train_flag_of_their_layer() -> None:
    model = seeded(lambda: nn.Linear(6, 4)).eval()
    modewright.quantize(model, "w8a8")
    assert not any(module.training for module in model.modules())


def test_layers_of_one_class_get_one_class() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    modewright.quantize(model, "w8a8")
    assert type(model[0]) is type(model[1])


def test_a_module_that_is_not_supported_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"LayerNorm cannot be quantized.*Linear"):
        insert_quantizers(nn.LayerNorm(2), SCHEMES["w8a8"])
