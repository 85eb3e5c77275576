# SPDX-License-Identifier: Apache-2.0
"""Layers of Transformers models: ``Conv1D``, attention with its cache, fused experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import MatchError
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.planning import SkipReason
from modewright.quantization.size import packed_bytes

transformers = pytest.importorskip("transformers")

IDS = torch.arange(1, 13).reshape(2, 6)  # 0 is padding
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
NO_EOS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}


def build(model: str, config: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, model)._from_config(config, **options)
    with torch.no_grad():  # or logits hardly depend on what attention and experts compute
        for parameter in made.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return made.eval()


def llama(**options: Any) -> Any:
    return build("LlamaForCausalLM", transformers.LlamaConfig(**SIZES, **NO_EOS), **options)


def gpt2(**options: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, **NO_EOS
    )
    return build("GPT2LMHeadModel", config, **options)


def mixtral(**options: Any) -> Any:
    config = transformers.MixtralConfig(**SIZES, **NO_EOS, num_local_experts=4)
    return build("MixtralForCausalLM", config, **options)


def qwen2_moe(**options: Any) -> Any:
    config = transformers.Qwen2MoeConfig(
        **SIZES,
        **NO_EOS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=16,
    )
    return build("Qwen2MoeForCausalLM", config, **options)


def gpt_oss(**options: Any) -> Any:
    config = transformers.GptOssConfig(
        **SIZES,
        **NO_EOS,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return build("GptOssForCausalLM", config, **options)


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, **options).logits
    return found


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def with_rounded_weights(plain: nn.Module, model: nn.Module) -> nn.Module:
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            for parameter in layer.quantized_parameters():
                value = nn.Parameter(layer.quantized_parameter(parameter).detach())
                setattr(plain.get_submodule(name), parameter, value)
    return plain


# --- Conv1D --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8"])
def test_conv1d_computes_what_a_linear_layer_with_its_transposed_weight_does(scheme: str) -> None:
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(6, 130)
    linear = nn.Linear(130, 6)
    linear.weight = nn.Parameter(layer.weight.detach().t().contiguous())
    linear.bias = layer.bias
    model, expected, x = nn.Sequential(layer), nn.Sequential(linear), torch.randn(2, 3, 130)
    modewright.quantize(model, scheme)
    modewright.quantize(expected, scheme)
    torch.testing.assert_close(model(x), expected(x))
    assert layer.weight_quantizer.scale.shape == linear.weight_quantizer.scale.shape
    assert torch.equal(layer.weight_matrix(layer.weight), linear.weight)
    assert torch.equal(layer.from_matrix(linear.weight), layer.weight)
    torch.testing.assert_close(layer.input_rows(x), linear.input_rows(x))
    sizes = [packed_bytes(m, {"0": scheme_of(m)}) for m in (model, expected)]
    assert sizes[0] == sizes[1]
    modewright.apply_mode(model, "export_quantize")
    assert type(layer) is transformers.pytorch_utils.Conv1D


def scheme_of(model: nn.Module) -> dict[str, Any]:
    recorded: dict[str, Any] = modewright.mode_state(model)["modes"][0]["metadata"]["layers"]["0"]
    return recorded


def test_all_projections_of_gpt2_are_quantized() -> None:
    model = gpt2()
    plain = copy.deepcopy(model)
    modewright.quantize(model, "w8a16")
    assert len(quantized(model)) == 2 * 4
    torch.testing.assert_close(logits(model), logits(with_rounded_weights(plain, model)))


# --- keys and values -----------------------------------------------------------------------------


class Seen:
    """Remembers what passes a quantizer."""

    def __init__(self, quantizer: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        quantizer.register_forward_hook(
            lambda module, args, output: self.shapes.append(tuple(args[0].shape))
        )


@pytest.mark.parametrize(
    ("make", "implementation"),
    [
        *[(make, name) for make in (llama, gpt2, mixtral) for name in ("sdpa", "eager")],
        (gpt_oss, "eager"),  # it has attention sinks, and sdpa has none
    ],
)
@pytest.mark.parametrize("scheme", ["kv8", "kv_fp8"])
def test_keys_and_values_are_quantized_with_and_without_a_cache(
    make: Callable[..., Any], implementation: str, scheme: str
) -> None:
    model = make(attn_implementation=implementation)
    before, config = logits(model), model.config.to_json_string()
    modewright.quantize(model, scheme, calibration=[IDS])
    names = quantized(model)
    assert len(names) == 2
    assert all(name.endswith(("attn", "self_attn")) for name in names)
    after = logits(model)
    assert 1e-6 < (after - before).norm() / before.norm() < 0.5  # other experts may be picked
    torch.testing.assert_close(logits(model, use_cache=False), after)
    tokens = [
        model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*tokens)
    assert model.config.to_json_string() == config
    assert model.config._attn_implementation == implementation


def test_sdpa_and_eager_attention_see_the_same_quantized_states() -> None:
    found = []
    for implementation in ("sdpa", "eager"):
        model = llama(attn_implementation=implementation)
        modewright.quantize(model, "kv8")
        found.append(logits(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_the_implementation_may_be_changed_while_the_model_is_quantized() -> None:
    model = llama(attn_implementation="sdpa")
    modewright.quantize(model, "kv8")
    expected = logits(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_every_token_of_every_head_has_a_scale_of_its_own() -> None:
    model = llama()
    modewright.quantize(model, "kv8")
    attention = model.model.layers[0].self_attn
    seen, found = Seen(attention.key_quantizer), []
    attention.key_quantizer.register_forward_hook(
        lambda module, args, output: found.append((args[0], output))
    )
    logits(model)
    assert seen.shapes == [(2, 1, 6, 8)]
    states, output = found[0]
    scale = states.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(output, (states / scale).round() * scale)


def test_static_scales_of_keys_and_values_are_calibrated() -> None:
    model = llama()
    modewright.quantize(model, "kv_fp8", calibration=[IDS])
    attention = model.model.layers[1].self_attn
    assert attention.key_quantizer.scale.shape == (1, 1)
    assert attention.key_quantizer.scale != attention.value_quantizer.scale


def test_weights_and_keys_and_values_are_quantized_together() -> None:
    model = llama()
    rules = [{"targets": ["*.self_attn"], "scheme": "kv8"}]
    modewright.quantize(model, "w8a8", config={"ignore": ["lm_head"], "rules": rules})
    assert len(quantized(model)) == 2 * (1 + 7)
    assert torch.isfinite(logits(model)).all()


def test_patterns_pick_the_attention_layers() -> None:
    model = llama()
    modewright.quantize(model, "kv8", config={"targets": ["*.0.self_attn"]})
    assert quantized(model) == {"model.layers.0.self_attn"}


def test_a_pattern_for_attention_without_anything_to_do_there_is_an_error() -> None:
    with pytest.raises(MatchError, match="LlamaAttention"):
        modewright.apply_mode(
            llama(), ("quantize", {"scheme": "w8a8", "targets": ["*.self_attn", "lm_head"]})
        )


def test_quantized_attention_is_saved_restored_copied_and_folded(tmp_path: Path) -> None:
    model = llama()
    plain, config = logits(model), model.config.to_json_string()
    modewright.quantize(model, "kv_fp8", calibration=[IDS])
    expected = logits(model)
    path = modewright.save(model, tmp_path / "model.safetensors")
    restored = modewright.restore(llama(), path)
    assert torch.equal(logits(restored), expected)
    assert torch.equal(logits(copy.deepcopy(restored)), expected)
    attention = restored.model.layers[0].self_attn
    assert attention.config.hidden_size == 16
    modewright.apply_mode(restored, "export_quantize")
    assert type(attention) is transformers.models.llama.modeling_llama.LlamaAttention
    assert torch.equal(logits(restored), plain)
    assert restored.config.to_json_string() == config
    skipped = modewright.mode_state(restored)["modes"][-1]["metadata"]["skipped"]
    assert {entry["module"] for entry in skipped} == {
        f"model.layers.{number}.self_attn" for number in (0, 1)
    }


def test_a_saved_folder_has_the_config_of_the_plain_model(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "plain")
    modewright.quantize(model, "kv8")
    model.save_pretrained(tmp_path / "quantized")
    plain, other = (tmp_path / name / "config.json" for name in ("plain", "quantized"))
    assert other.read_text() == plain.read_text()


# --- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mixtral, qwen2_moe, gpt_oss], ids=lambda make: make.__name__)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_fused_experts_compute_with_every_weight_rounded(
    make: Callable[..., Any], implementation: str
) -> None:
    model = make(experts_implementation=implementation)
    plain = copy.deepcopy(model)
    modewright.quantize(model, "w4a16")
    experts = model.model.layers[0].mlp.experts
    assert list(experts.quantized_parameters()) == ["gate_up_proj", "down_proj"]
    with_rounded_weights(plain, model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-3)
    modewright.apply_mode(model, "export_quantize")
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("make", [mixtral, gpt_oss], ids=lambda make: make.__name__)
def test_scales_of_experts_are_per_expert_and_channel_along_the_input(
    make: Callable[..., Any],
) -> None:
    model = make()
    modewright.quantize(model, "w8a16")
    experts = model.model.layers[0].mlp.experts
    axis = 1 if make is gpt_oss else 2  # of the input
    weight = experts.gate_up_proj.detach()
    expected = weight.abs().amax(axis) / 127
    assert torch.equal(experts.gate_up_proj_quantizer.scale.reshape(4, 64), expected)
    scale = expected.unsqueeze(axis)
    rounded = (weight / scale).round() * scale
    torch.testing.assert_close(experts.quantized_parameter("gate_up_proj"), rounded)


def test_inputs_of_experts_are_rounded_where_they_enter() -> None:
    model = mixtral()
    modewright.quantize(model, "w8a8")
    seen = Seen(model.model.layers[0].mlp.experts.input_quantizer)
    logits(model)
    assert seen.shapes == [(12, 16)]


def test_routers_are_skipped_with_the_reason_unless_a_pattern_names_them() -> None:
    model = qwen2_moe()
    modewright.quantize(model, "w8a16")
    skipped = modewright.mode_state(model)["modes"][0]["metadata"]["skipped"]
    assert {entry["module"] for entry in skipped} == {
        f"model.layers.{number}.mlp.{name}"
        for number in (0, 1)
        for name in ("gate", "shared_expert_gate")
    }
    assert {entry["reason"] for entry in skipped} == {SkipReason.ROUTER}

    named = qwen2_moe()
    plain = copy.deepcopy(named)
    modewright.quantize(named, "w8a16", config={"targets": ["*.gate", "*.shared_expert_gate"]})
    assert len(quantized(named)) == 4
    torch.testing.assert_close(logits(named), logits(with_rounded_weights(plain, named)))


def test_experts_are_counted_by_expert_and_channel() -> None:
    model = mixtral()
    before = sum(p.numel() for p in model.parameters())
    modewright.quantize(model, "w8a16", config={"targets": ["*.experts"]})
    layers = modewright.mode_state(model)["modes"][0]["metadata"]["layers"]
    weights = 2 * 4 * (64 * 16 + 16 * 32)
    channels = 2 * 4 * (64 + 16)
    assert packed_bytes(model, layers) == (before - weights) * 4 + weights + channels * 4


@pytest.mark.parametrize("make", [mixtral, gpt_oss], ids=lambda make: make.__name__)
def test_a_model_with_experts_is_saved_and_restored(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    model = make()
    modewright.quantize(model, "w8a8_static", calibration=[IDS])
    path = modewright.save(model, tmp_path / "model.safetensors")
    assert torch.equal(logits(modewright.restore(make(), path)), logits(model))
