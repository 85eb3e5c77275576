# SPDX-License-Identifier: Apache-2.0
"""The calibrating modes on a tiny language model: what each promises of the whole network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import ApplyModeError
from modewright.quantization.blockwise import as_original
from modewright.quantization.convert import quantized_layers

FEATURES = 32
WEIGHT_MODES: dict[str, dict[str, Any]] = {
    "mse": {},
    "hqq": {},
    "gptq": {},
    "learned_rounding": {"iterations": 20},
    "lsq": {"epochs": 2, "rate": 0.01},
}


@pytest.fixture(scope="module")
def original() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=FEATURES,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # gains that differ, as trained ones do
                parameter.uniform_(0.2, 2.0)
            else:
                parameter.mul_(3)
    return model


def windows(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (1, 24), generator=generator) for _ in range(count)]


CALIBRATION = windows(12, 1)
HELD_OUT = windows(4, 2)


def quantized(original: nn.Module, scheme: str, *modes: Any) -> nn.Module:
    model = copy.deepcopy(original)
    config = {"scheme": scheme, "ignore": ["lm_head"]}
    modewright.apply_mode(model, ("quantize", config))
    for mode in modes:
        modewright.apply_mode(model, mode, mode_kwargs={"calibration": CALIBRATION})
    return model


@torch.no_grad()
def error(model: nn.Module, original: nn.Module, batches: list[torch.Tensor]) -> float:
    pairs = [(model(ids).logits, original(ids).logits) for ids in batches]
    return float(sum((a - b).square().mean() for a, b in pairs) / len(pairs))


def metadata(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = modewright.mode_state(model)["modes"][-1]["metadata"]
    return found


@pytest.mark.parametrize("mode", WEIGHT_MODES)
def test_low_bits_lose_less_than_with_max_scales(original: nn.Module, mode: str) -> None:
    plain = quantized(original, "w3a16_asym", "max_calibrate")
    model = quantized(original, "w3a16_asym", (mode, WEIGHT_MODES[mode]))

    assert error(model, original, CALIBRATION) < 0.97 * error(plain, original, CALIBRATION)


@pytest.mark.parametrize("mode", ["gptq", "learned_rounding"])
@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "w4a8", "w2a16", "nf4"])
def test_chosen_codes_help_in_every_kind_of_scheme(
    original: nn.Module, scheme: str, mode: str
) -> None:
    plain = quantized(original, scheme, "max_calibrate")
    model = quantized(original, scheme, (mode, WEIGHT_MODES[mode]))

    assert error(model, original, CALIBRATION) < error(plain, original, CALIBRATION)


@pytest.mark.parametrize("mode", ["smoothquant", "awq"])
@pytest.mark.parametrize("fold", [True, False])
def test_smoothing_leaves_the_unquantized_function_as_it_was(
    original: nn.Module, mode: str, fold: bool
) -> None:
    model = quantized(original, "w4a8", (mode, {"fold": fold}))
    changed = [
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, original.get_parameter(name))
    ]
    with as_original(model):
        difference = error(model, original, HELD_OUT)

    assert changed
    assert difference < 1e-10 * float(original(HELD_OUT[0]).logits.detach().square().mean())


@pytest.mark.parametrize("mode", ["smoothquant", "awq"])
def test_smoothing_makes_no_layer_worse(original: nn.Module, mode: str) -> None:
    solved = metadata(quantized(original, "w4a8", mode))["solved"]

    assert len(solved) == 14
    for entry in solved.values():
        assert entry["relative_error"] <= entry["relative_error_before"]


def test_smoothing_goes_into_norms_values_and_gated_products(original: nn.Module) -> None:
    model = quantized(original, "w4a8", "awq")
    solved = metadata(model)["solved"]

    assert {
        name.split(".", 3)[3]: entry["folded_into"]
        for name, entry in solved.items()
        if name.startswith("model.layers.1.")
    } == {
        "self_attn.q_proj": "input_layernorm",
        "self_attn.k_proj": "input_layernorm",
        "self_attn.v_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    }


def test_what_cannot_be_folded_is_done_by_the_layers(original: nn.Module) -> None:
    model = quantized(original, "w4a8", ("awq", {"fold": False}))
    layer = quantized_layers(model)["model.layers.0.mlp.down_proj"]

    assert layer.pre_quant_scale is not None
    assert layer.pre_quant_scale.shape == (64,)
    assert metadata(model)["transforms"]["model.layers.0.mlp.down_proj"]


def test_gptq_looks_at_exact_inputs_if_asked(original: nn.Module) -> None:
    exact = quantized(original, "fp8", ("gptq", {"exact_inputs": True}))
    rounded = quantized(original, "fp8", "gptq")
    weights_only = quantized(original, "fp8_w8a16", "gptq")

    def codes(model: nn.Module) -> list[torch.Tensor]:
        layers = quantized_layers(model).values()
        return [q.code_values() for y in layers for q in y.quantized_parameters().values()]

    assert all(map(torch.equal, codes(exact), codes(weights_only)))
    assert not all(map(torch.equal, codes(rounded), codes(weights_only)))
    activations = [
        q for y in quantized_layers(exact).values() for q in y.activation_quantizers().values()
    ]
    assert activations
    assert all(q.enabled for q in activations)


def test_gptq_reports_an_error_below_that_of_the_nearest_codes(original: nn.Module) -> None:
    model = quantized(original, "w4a16", "gptq")
    solved = metadata(model)["solved"]

    assert len(solved) == 14
    for entry in solved.values():
        assert entry["relative_error"] <= entry["relative_error_nearest"]


def test_learned_rounding_ends_no_block_above_its_start(original: nn.Module) -> None:
    model = quantized(original, "w2a16", "gptq", ("learned_rounding", {"iterations": 10}))

    for entry in metadata(model)["solved"].values():
        assert entry["block_error_after"] <= entry["block_error_before"]


def test_learning_that_leads_astray_changes_nothing(original: nn.Module) -> None:
    config = {"iterations": 1, "rate": 100.0, "scale_rate": 100.0, "optimizer": "adam"}
    before = quantized(original, "w4a16", "gptq")
    after = quantized(original, "w4a16", "gptq", ("learned_rounding", config))

    assert torch.equal(before(HELD_OUT[0]).logits, after(HELD_OUT[0]).logits)


def test_lsq_keeps_its_best_and_leaves_codes_alone(original: nn.Module) -> None:
    before = quantized(original, "w3a16", "gptq")
    after = quantized(original, "w3a16", "gptq", ("lsq", {"epochs": 3, "rate": 0.002}))
    history = metadata(after)["loss"]
    name = "model.layers.0.mlp.down_proj"
    first, second = (quantized_layers(m)[name].weight_quantizer for m in (before, after))

    assert len(history) == 4
    assert min(history) < history[0]
    assert first is not None
    assert second is not None
    assert torch.equal(first.code_values(), second.code_values())
    assert not torch.equal(first.scale, second.scale)


def test_a_long_stack_gets_better_step_by_step_and_restores(original: nn.Module) -> None:
    stack = ["max_calibrate", "awq", "gptq", ("learned_rounding", {"iterations": 20})]
    errors = []
    for length in range(1, len(stack) + 1):
        model = quantized(original, "w2a16", *stack[:length])
        errors.append(error(model, original, CALIBRATION))
    restored = modewright.restore_from_mode_state(
        copy.deepcopy(original), modewright.mode_state(model)
    )
    restored.load_state_dict(model.state_dict())

    assert errors[-1] < errors[2] < errors[0]
    assert torch.equal(restored(HELD_OUT[0]).logits, model(HELD_OUT[0]).logits)


def test_folded_weights_are_what_the_quantized_model_computes(original: nn.Module) -> None:
    model = quantized(original, "w4a16", "awq", "gptq")
    expected = model(HELD_OUT[0]).logits
    modewright.apply_mode(model, "export_quantize")

    assert torch.allclose(model(HELD_OUT[0]).logits, expected, atol=1e-5)
    assert not quantized_layers(model)


def test_originals_stay_in_the_model_until_it_is_exported(original: nn.Module) -> None:
    model = quantized(original, "w2a16", "gptq", ("learned_rounding", {"iterations": 5}))

    with as_original(model):
        assert torch.equal(model(HELD_OUT[0]).logits, original(HELD_OUT[0]).logits)


@pytest.mark.parametrize("mode", ["gptq", "awq", "smoothquant", "learned_rounding", "lsq"])
def test_modes_that_need_data_say_so_and_change_nothing(original: nn.Module, mode: str) -> None:
    model = quantized(original, "w4a16")
    before = model.state_dict()

    with pytest.raises(ApplyModeError, match="calibration"):
        modewright.apply_mode(model, mode)
    assert list(model.state_dict()) == list(before)


class Rare(nn.Module):
    """A layer that sees few tokens, and one that sees none."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.seldom, self.never = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.always(x)
        return y + torch.cat([self.seldom(x[:2]), y[2:]])


def test_layers_with_too_little_data_are_named_and_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    model = Rare()
    modewright.apply_mode(model, ("quantize", {"scheme": "w8a16"}))
    data = {"calibration": [torch.randn(16, 8) for _ in range(4)]}
    modewright.apply_mode(model, ("gptq", {"min_tokens": 32}), mode_kwargs=data)
    skipped = {item["module"]: item["reason"] for item in metadata(model)["skipped"]}

    assert set(skipped) == {"seldom", "never"}
    assert "8 of 32 tokens" in skipped["seldom"]
    layers = quantized_layers(model)
    assert layers["always"].weight_quantizer.codes is not None  # type: ignore[union-attr]
    assert layers["never"].weight_quantizer.scale is not None  # type: ignore[union-attr]


def test_importance_lets_weights_of_large_inputs_keep_their_precision() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 16, bias=False))
    size = torch.ones(64)
    size[:32] = 30.0
    with torch.no_grad():
        layer[0].weight[:, 32:] *= 4  # the largest weights see the smallest inputs
    batches = [torch.randn(32, 64) * size for _ in range(4)]
    expected = torch.cat([layer(b) for b in batches]).detach()
    errors = {}
    for importance in (True, False):
        model = copy.deepcopy(layer)
        modewright.apply_mode(model, ("quantize", {"scheme": "w3a16"}))
        modewright.apply_mode(
            model, ("mse", {"importance": importance}), mode_kwargs={"calibration": batches}
        )
        errors[importance] = float(
            (torch.cat([model(b) for b in batches]).detach() - expected).norm()
        )

    assert errors[True] < errors[False]


def test_a_branch_of_low_rank_leaves_less_error(original: nn.Module) -> None:
    plain = quantized(original, "w3a16", "max_calibrate")
    model = quantized(original, "w3a16", ("svdquant", {"rank": 8}))

    assert error(model, original, CALIBRATION) < 0.8 * error(plain, original, CALIBRATION)
    for entry in metadata(model)["solved"].values():
        assert entry["weighted_error"] <= entry["weighted_error_before"]
    with as_original(model):
        assert error(model, original, HELD_OUT) < 1e-9


def test_a_branch_as_large_as_the_weight_is_refused_with_the_reason(original: nn.Module) -> None:
    model = quantized(original, "w3a16", ("svdquant", {"rank": 20}))

    assert all("no smaller" in item["reason"] for item in metadata(model)["skipped"])
    assert len(metadata(model)["skipped"]) == 14


def test_corrected_biases_leave_no_mean_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 4, False))
    batches = [torch.randn(32, 16) + 2 for _ in range(3)]
    plain = copy.deepcopy(model)
    modes = [("quantize", {"scheme": "w2a16"}), "max_calibrate"]
    modewright.apply_mode(model, modes)
    with torch.no_grad():
        inputs = torch.cat(batches)
        wanted = plain[0](inputs).mean(0)
        before = (model[0](inputs).mean(0) - wanted).abs().max()
        modewright.apply_mode(model, "bias_correction", mode_kwargs={"calibration": batches})
        after = (model[0](inputs).mean(0) - wanted).abs().max()

    assert after < 1e-5 < before
    assert {item["module"] for item in metadata(model)["skipped"]} == {"3"}


@pytest.mark.parametrize("size", [None, 4, 16])
def test_rotated_inputs_leave_the_unquantized_function_as_it_was(
    original: nn.Module, size: int | None
) -> None:
    model = quantized(original, "mxfp4", ("hadamard", {"size": size}))
    sizes = {layer.hadamard_size for layer in quantized_layers(model).values()}

    assert sizes == {size or 32}
    with as_original(model):
        assert error(model, original, HELD_OUT) < 1e-9


def test_rotation_spreads_outliers_of_inputs() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    inputs = torch.randn(256, 64)
    inputs[:, 7] *= 60
    wanted = layer(inputs).detach()
    errors = {}
    for rotated in (False, True):
        model = copy.deepcopy(layer)
        modewright.apply_mode(model, ("quantize", {"scheme": "w8a8"}))
        if rotated:
            modewright.apply_mode(model, "hadamard")
        errors[rotated] = float((model(inputs).detach() - wanted).norm())

    assert errors[True] < 0.6 * errors[False]


def test_layers_without_quantized_inputs_are_not_rotated_unless_asked(original: nn.Module) -> None:
    left = metadata(quantized(original, "w4a16", "hadamard"))["skipped"]
    model = quantized(original, "w4a16", ("hadamard", {"weights_too": True}))

    assert len(left) == 14
    assert len(metadata(model)["solved"]) == 14


def test_smoothing_sees_the_first_tokens_whose_inputs_are_much_larger() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    batches = [torch.randn(1, 2048, 32, generator=generator) for _ in range(8)]
    for batch in batches:
        batch[:, :, 5] *= 20  # an outlier in every token, in another channel than the first one's
        batch[:, 0] = 0.1 * batch[:, 0]
        batch[:, 0, 3] = 2000.0
    first = torch.cat([batch[:, 0] for batch in batches])
    wanted = model(first).detach()
    modewright.apply_mode(model, ("quantize", {"scheme": "w8a8"}))
    before = (model(first) - wanted).norm()

    modewright.apply_mode(model, "smoothquant", mode_kwargs={"calibration": batches})

    assert (model(first) - wanted).norm() < 1.5 * before
