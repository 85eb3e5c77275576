# SPDX-License-Identifier: Apache-2.0
"""torch's attention and encoder layers, which read the weights of their parts without calling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.quantization.layers import QuantizedLayer


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options}).eval()
    with torch.no_grad():  # biases begin at zero, where a wrong one would not be noticed
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def with_rounded_weights(plain: nn.Module, quantized: nn.Module) -> nn.Module:
    """Put into a plain copy the weights that the quantized model computes with."""
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLayer):
            for parameter in layer.quantized_parameters():
                value = nn.Parameter(layer.quantized_parameter(parameter).detach())
                setattr(plain.get_submodule(name), parameter, value)
    return plain


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        pytest.param({}, (8, 8), id="one projection matrix"),
        pytest.param({"kdim": 6, "vdim": 4}, (6, 4), id="one for each input"),
        pytest.param({"bias": False, "batch_first": False}, (8, 8), id="time first, no bias"),
        pytest.param({"add_bias_kv": True, "add_zero_attn": True}, (8, 8), id="bias_kv"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batched", [True, False])
def test_attention_computes_with_every_projection_rounded(
    options: dict[str, Any], widths: tuple[int, int], masked: bool, batched: bool
) -> None:
    model = attention(**options)
    plain = copy.deepcopy(model)
    modewright.quantize(model, "w8a16")
    with_rounded_weights(plain, model)
    lead = ((2, 4) if options.get("batch_first", True) else (4, 2)) if batched else (4,)
    query, key, value = (inputs(*lead, width) for width in (8, *widths))
    masks: dict[str, Any] = {}
    if masked:
        padding = torch.tensor([[False, False, False, True], [False, False, True, True]])
        masks = {
            "key_padding_mask": padding if batched else padding[0],
            "attn_mask": torch.ones(4, 4).triu(1).bool(),
            "average_attn_weights": False,
        }
    found, expected = model(query, key, value, **masks), plain(query, key, value, **masks)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        model(query, key, value, need_weights=False, **masks)[0], expected[0]
    )
    assert not torch.equal(model.out_proj.quantized_weight(), model.out_proj.weight)


def test_inputs_of_attention_and_of_its_output_projection_are_rounded() -> None:
    model = attention()
    modewright.quantize(model, "w8a8")
    x = inputs(2, 4, 8)
    rounded = [
        model.input_quantizer(x),
        model.key_input_quantizer(x),
        model.value_input_quantizer(x),
    ]
    reached = []
    model.out_proj.input_quantizer.register_forward_hook(lambda *_: reached.append(True))
    expected = model(x, x, x)[0]
    assert reached
    for name in ("input_quantizer", "key_input_quantizer", "value_input_quantizer"):
        getattr(model, name).enabled = False
    torch.testing.assert_close(model(*rounded)[0], expected)
    assert not torch.allclose(model(x, x, x)[0], expected)


def test_static_scales_of_query_key_and_value_are_calibrated_apart() -> None:
    model = nn.ModuleList([attention()])
    x = inputs(2, 4, 8)

    def run(module: nn.Module) -> None:
        module[0](x, 2 * x, 4 * x)

    modewright.quantize(model, "w8a8_static", calibration=run)
    scales = [
        getattr(model[0], f"{name}input_quantizer").scale.item() for name in ("", "key_", "value_")
    ]
    assert scales == pytest.approx([scales[0], 2 * scales[0], 4 * scales[0]])


def test_a_quantized_output_projection_is_called_though_the_attention_is_not_quantized() -> None:
    model, x = attention(), inputs(2, 4, 8)
    plain = copy.deepcopy(model)
    holder = nn.ModuleDict({"attention": model})
    modewright.quantize(holder, "w8a16", config={"targets": ["*.out_proj"]})
    assert list(modewright.mode_state(holder)["modes"][0]["metadata"]["layers"]) == [
        "attention.out_proj"
    ]
    with_rounded_weights(plain, model)
    torch.testing.assert_close(model(x, x, x), plain(x, x, x))
    modewright.apply_mode(holder, "export_quantize")
    assert type(model) is nn.MultiheadAttention
    torch.testing.assert_close(model(x, x, x), plain(x, x, x))


class Fused(nn.MultiheadAttention):
    """Reads the weights of its output projection in a forward of its own."""

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        value = query @ self.in_proj_weight[-8:].t()
        return value @ self.out_proj.weight.t()


def test_attention_with_its_own_forward_reads_rounded_weights_also_of_its_parts() -> None:
    torch.manual_seed(0)
    model, x = Fused(8, 2), inputs(2, 8)
    plain = copy.deepcopy(model)
    modewright.quantize(model, "w8a16")
    with_rounded_weights(plain, model)
    assert torch.equal(model(x), plain(x))


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, **{"batch_first": True, **options})
    nested = layer.self_attn.batch_first and not layer.norm_first
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "gelu"}, {"norm_first": True}, {"batch_first": False}],
    ids=str,
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_encoders_compute_with_every_weight_rounded(options: dict[str, Any], grad: bool) -> None:
    model, x = encoder(**options), inputs(2, 4, 8)
    plain = copy.deepcopy(model)
    kinds = (nn.Linear, nn.MultiheadAttention)
    names = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    modewright.quantize(model, "w8a16")
    assert {n for n, m in model.named_modules() if isinstance(m, QuantizedLayer)} == names
    with_rounded_weights(plain, model)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


def test_every_quantizer_of_an_encoder_runs_in_inference() -> None:
    model, x = encoder(), inputs(2, 4, 8)
    modewright.quantize(model, "w8a8_static", calibration=[x])
    reached = set()
    for name, module in model.named_modules():
        if name.endswith("input_quantizer"):
            module.register_forward_hook(lambda *_, name=name: reached.add(name))
    with torch.no_grad():
        model(x)
    assert len(reached) == 2 * (3 + 1 + 2)


def test_padded_sequences_give_what_they_give_in_training() -> None:
    model, x = encoder(), inputs(2, 4, 8)
    model.use_nested_tensor = False  # or the plain one puts zeros there, and warns
    padding = torch.tensor([[False, False, False, True], [False, False, False, False]])
    plain = copy.deepcopy(model)
    modewright.quantize(model, "w8a16")
    with_rounded_weights(plain, model)
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)
        expected = plain(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_fused_kernels_are_back_after_export() -> None:
    model, x = encoder(), inputs(2, 4, 8)
    keys, attributes = list(model.state_dict()), set(vars(model.layers[0]))
    modewright.quantize(model, "w8a16")
    assert isinstance(model.layers[0], nn.TransformerEncoderLayer)
    assert model.layers[0].activation_relu_or_gelu == 0
    expected = model(x)
    modewright.apply_mode(model, "export_quantize")
    assert type(model) is nn.TransformerEncoder
    assert type(model.layers[0]) is nn.TransformerEncoderLayer
    assert model.layers[0].activation_relu_or_gelu == 1
    assert list(model.state_dict()) == keys
    assert set(vars(model.layers[0])) == attributes
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_of_which_nothing_is_quantized_keeps_its_kernel() -> None:
    model = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(8, 2)})
    modewright.quantize(model, "w8a16", config={"targets": ["head"]})
    assert type(model["encoder"].layers[0]) is nn.TransformerEncoderLayer


def test_a_whole_transformer_is_quantized_and_copied() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 12, batch_first=True).eval()
    x, y = inputs(2, 4, 8), inputs(2, 3, 8)
    expected = model(x, y)
    modewright.quantize(model, "w8a8")
    found = model(x, y)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1
    assert torch.equal(copy.deepcopy(model)(x, y), found)
