# SPDX-License-Identifier: Apache-2.0
"""Quantized layers compute what the plain layer computes on quantized input and weight."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from modewright.quantization.layers import (
    QUANTIZED_CLASSES,
    QuantizedLayer,
    insert_quantizers,
    remove_quantizers,
)
from modewright.quantization.representation import QuantizerConfig, SchemeConfig

WEIGHTS = QuantizerConfig(num_bits=4, granularity="channel")
TOKENS = QuantizerConfig(num_bits=8, granularity="token", dynamic=True)
TENSOR = QuantizerConfig(num_bits=8, granularity="tensor")
SCHEME = SchemeConfig(weights=WEIGHTS, input_activations=TENSOR, output_activations=TENSOR)

# (make the layer, its input, keywords of the call)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, object]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6), {}),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6), {}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9), {}),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=2, dilation=(1, 2)), (2, 3, 9, 9), {}),
    "conv2d reflecting": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
        (2, 3, 5, 5),
        {},
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), {}),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5), {}),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1, output_padding=1),
        (2, 3, 5, 5),
        {},
    ),
    "transposed 2d to a size": (
        lambda: nn.ConvTranspose2d(3, 5, 3, stride=2),
        (2, 3, 5, 5),
        {"output_size": [12, 12]},
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (1, 2, 3, 3, 3), {}),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def prepared(name: str) -> tuple[nn.Module, torch.Tensor, dict[str, object]]:
    torch.manual_seed(0)
    make, shape, keywords = LAYERS[name]
    return make(), torch.randn(shape), keywords


def rounded(tensor: torch.Tensor, bits: int, axis: int | None) -> torch.Tensor:
    """Symmetric max quantization, written independently of the library."""
    top = 2 ** (bits - 1) - 1
    others = [d for d in range(tensor.ndim) if d != axis]
    amax = tensor.abs().amax(dim=others, keepdim=True)
    scale = torch.where(amax == 0, torch.ones_like(amax), amax / top)
    return (tensor / scale).round().clamp(-top - 1, top) * scale


@every_layer
def test_the_forward_is_the_plain_one_on_quantized_tensors(name: str) -> None:
    layer, data, keywords = prepared(name)
    transposed = type(layer).__name__.startswith("ConvTranspose")
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight.copy_(rounded(layer.weight, 4, 1 if transposed else 0))
        expected = rounded(plain(rounded(data, 8, None), **keywords), 8, None)

        insert_quantizers(layer, SCHEME)
        result = layer(data, **keywords)

    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@every_layer
def test_names_keys_and_types_stay(name: str) -> None:
    layer, data, keywords = prepared(name)
    original, weight, keys = type(layer), layer.weight, list(layer.state_dict())

    insert_quantizers(layer, SCHEME)

    assert isinstance(layer, original)
    assert isinstance(layer, QuantizedLayer)
    assert layer.weight is weight
    assert list(layer.state_dict()) == keys  # dynamic until calibrated: no buffers yet
    assert type(layer).__name__ == f"Quantized{original.__name__}"

    remove_quantizers(layer)
    assert type(layer) is original
    assert dict(layer.named_children()) == {}


@every_layer
def test_a_layer_without_quantizers_computes_the_same_bits(name: str) -> None:
    layer, data, keywords = prepared(name)
    expected = layer(data, **keywords)

    insert_quantizers(layer, SchemeConfig())

    assert torch.equal(layer(data, **keywords), expected)


def test_an_embedding_has_its_rows_quantized_and_its_indices_left_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(10, 4, padding_idx=0)
    indices = torch.tensor([[0, 3, 9]])
    expected = rounded(layer.weight.detach(), 4, 0)[indices]

    insert_quantizers(layer, SchemeConfig(weights=WEIGHTS, input_activations=TOKENS))

    assert layer.input_quantizer is None
    torch.testing.assert_close(layer(indices).detach(), expected)


def test_a_convolution_gets_one_input_scale_where_a_linear_layer_gets_one_per_token() -> None:
    scheme = SchemeConfig(weights=WEIGHTS, input_activations=TOKENS)
    conv = insert_quantizers(nn.Conv2d(1, 1, 1), scheme)
    linear = insert_quantizers(nn.Linear(1, 1), scheme)

    assert conv.input_quantizer is not None
    assert linear.input_quantizer is not None
    assert conv.input_quantizer.config.granularity == "tensor"
    assert linear.input_quantizer.config.granularity == "token"


def test_a_subclass_keeps_its_methods() -> None:
    class Own(nn.Linear):
        def double(self) -> torch.Tensor:
            return 2 * self.weight

    layer = Own(2, 2)
    insert_quantizers(layer, SCHEME)

    assert isinstance(layer, Own)
    assert torch.equal(layer.double(), 2 * layer.weight)


def test_gradients_flow_to_weight_bias_and_input() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    insert_quantizers(layer, SCHEME)
    data = torch.randn(3, 6, requires_grad=True)

    layer(data).square().sum().backward()

    for tensor in (data, layer.weight, layer.bias):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_int8_arithmetic_gives_what_the_simulation_gives() -> None:
    """An int8 kernel multiplies codes and applies the scales to the int32 sum."""
    torch.manual_seed(0)
    layer, data = nn.Linear(64, 32, bias=False), torch.randn(5, 64)
    scheme = SchemeConfig(
        weights=QuantizerConfig(num_bits=8, granularity="channel"), input_activations=TOKENS
    )
    scale_w = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    scale_x = data.abs().amax(1, keepdim=True) / 127
    codes_w = (layer.weight.detach() / scale_w).round().to(torch.int32)
    codes_x = (data / scale_x).round().to(torch.int32)
    expected = (codes_x @ codes_w.T).float() * scale_x * scale_w.T

    insert_quantizers(layer, scheme)

    torch.testing.assert_close(layer(data).detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_copy_is_independent() -> None:
    layer = nn.Linear(2, 2)
    insert_quantizers(layer, SCHEME)
    twin = copy.deepcopy(layer)
    remove_quantizers(twin)

    assert isinstance(layer, QuantizedLayer)
    assert type(twin) is nn.Linear


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(TypeError, match="LayerNorm"):
        insert_quantizers(nn.LayerNorm(2), SCHEME)


def test_every_supported_class_is_tested_here() -> None:
    tested = {type(make()) for make, _, _ in LAYERS.values()} | {nn.Embedding}

    assert tested == set(QUANTIZED_CLASSES)
