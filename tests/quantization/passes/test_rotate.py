# SPDX-License-Identifier: Apache-2.0
"""Mode ``rotate``: the function stays, outliers spread, and what cannot be rotated is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import modewright
from modewright.errors import ModewrightError
from modewright.quantization.residual import find_stream
from support.models import LM, MLP, STREAM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
IDS = torch.arange(24).reshape(2, 12)


def build(name: str, **more: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for path, module in model.named_modules():
            if path.endswith("norm"):
                nn.init.uniform_(module.weight, 0.5, 2.0)
    return model


def rotated(model: nn.Module, **config: Any) -> nn.Module:
    return modewright.apply_mode(model, ("rotate", config), mode_kwargs={"calibration": [IDS]})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def metadata(model: nn.Module) -> dict[str, Any]:
    return modewright.mode_state(model)["modes"][-1]["metadata"]


FAMILIES = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "gain counts from one": ("Gemma", {"tie_word_embeddings": True}),
    "norms inside attention": ("Qwen3", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal"])
@pytest.mark.parametrize(("name", "more"), FAMILIES.values(), ids=FAMILIES)
def test_function_is_unchanged(name: str, more: dict[str, Any], rotation: str) -> None:
    model = build(name, **more)
    expected = logits(model)
    before = copy.deepcopy(model.state_dict())

    model = rotated(model, rotation=rotation)

    assert (logits(model) - expected).norm() / expected.norm() < 1e-5
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    layers = 2 * (4 + 3)  # q k v o, gate up down: every weight of every block
    assert len({k for k in changed if "proj.weight" in k}) == layers


def test_stream_is_found_by_what_runs() -> None:
    model = build("Llama", tie_word_embeddings=True)
    stream = find_stream(model, lambda: model(IDS))

    assert stream.width == 48
    assert [norm.path for norm in stream.norms] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ]
    assert set(stream.norms[1].readers) == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    }
    assert set(stream.norms[-1].readers) == {"lm_head"}
    assert {path.rpartition(".")[2] for path in stream.writers} == {"o_proj", "down_proj"}


def test_outlier_channel_of_the_stream_spreads() -> None:
    model = build("Llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 100
    seen: list[torch.Tensor] = []
    first = model.model.layers[0].self_attn.q_proj
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    logits(model)
    model = rotated(model)
    seen_last = (logits(model), seen[-1])[1]

    def peak(x: torch.Tensor) -> float:
        return float(x.abs().amax() / x.square().mean().sqrt())

    assert peak(seen_last) < peak(seen[0]) / 2


def test_tied_head_gets_its_own_weight_and_the_config_says_so() -> None:
    model = rotated(build("Llama", tie_word_embeddings=True))

    assert metadata(model)["untied"] == ["lm_head"]
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False


def test_stack_of_rotation_and_quantization_is_saved_and_restored(tmp_path: Path) -> None:
    data = {"calibration": [IDS, IDS.flip(0) + 8]}
    model = rotated(build("Llama", tie_word_embeddings=True))
    ignore = {"ignore": ["lm_head"]}
    quantize = ("quantize", {"scheme": "w4a16", **ignore})
    model = modewright.apply_mode(model, quantize)
    for step in ("awq", ("gptq", {"min_tokens": 1}), ("learned_rounding", {"iterations": 2})):
        model = modewright.apply_mode(model, step, mode_kwargs=data)
    modewright.save(model, tmp_path / "kept")

    restored = modewright.restore(build("Llama", tie_word_embeddings=True), tmp_path / "kept")
    assert torch.equal(logits(restored), logits(model))
    assert restored.config.tie_word_embeddings is False


def test_seed_decides_and_repeats() -> None:
    weights = [rotated(build("Llama"), seed=seed).lm_head.weight for seed in (0, 0, 1)]

    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


REFUSED = {
    "norms with a mean": (lambda: MLP.make(), MLP.inputs, "has no embedding"),
    "no norms": (lambda: LM.make(), LM.inputs, "has no RMS norm of 8 features"),
    "norms of what is written": (
        lambda: build("Olmo2"),
        IDS,
        "has no RMS norm of 48 features|it was not done",
    ),
    "norms before and after": (
        lambda: build("Gemma2", sliding_window=16),
        IDS,
        "so it was not done",
    ),
}


@pytest.mark.parametrize(("make", "inputs", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_rotated_is_refused_and_stays(make: Any, inputs: Any, text: str) -> None:
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModewrightError, match=text):
        modewright.apply_mode(model, "rotate", mode_kwargs={"calibration": [inputs]}, atomic=False)

    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("calibration", "text"),
    [(None, "pass mode_kwargs"), ([], "there is none"), (lambda model: None, "did not run")],
    ids=["none", "empty", "function that does nothing"],
)
def test_data_is_needed(calibration: object, text: str) -> None:
    with pytest.raises(ModewrightError, match=text):
        modewright.apply_mode(STREAM.make(), "rotate", mode_kwargs={"calibration": calibration})


def test_function_may_run_the_model() -> None:
    def forward(model: nn.Module) -> None:
        model(STREAM.inputs)

    model = modewright.apply_mode(STREAM.make(), "rotate", mode_kwargs={"calibration": forward})
    expected = STREAM.run(STREAM.make())
    assert (STREAM.run(model) - expected).norm() / expected.norm() < 1e-5


def test_quantized_models_are_refused() -> None:
    model = modewright.apply_mode(STREAM.make(), ("quantize", {"scheme": "w4a16"}))
    with pytest.raises(ModewrightError, match="fake_quantized"):
        modewright.apply_mode(model, "rotate", mode_kwargs={"calibration": [STREAM.inputs]})
