# SPDX-License-Identifier: Apache-2.0
"""Fused blocks: the next token by the kernels, and all else by the block's own forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.integrations.generation import Decoding, cache_argument
from modewright.runtime.backends import using
from modewright.runtime.layers.fused import fuse, unfuse
from modewright.runtime.native.block import NativeBlock
from modewright.runtime.native.library import SWITCH, library
from support.library_recipes import VOCABULARY, llama, windows

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    isinstance(library(), str) or "avx2" not in library().isas,  # type: ignore[union-attr]
    reason="no kernels that are chosen for few rows",
)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def model_of(kind: str, **more: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def packed(model: Any, *, fused: bool = True, scheme: str = "w8a16") -> Any:
    modes: list[Any] = [("quantize", {"scheme": scheme}), "max_calibrate"]
    data = {"calibration": [{"input_ids": ids} for ids in windows()]}
    modewright.apply_mode(model, modes, mode_kwargs=data)
    return modewright.apply_mode(model, ("compress", {"fuse": fused}))


def steps(model: Any, prompt: torch.Tensor, count: int = 4) -> torch.Tensor:
    """Return the logits of some tokens that follow a prompt, one at a time."""
    cache, found = transformers.DynamicCache(config=model.config), []
    given: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    later = windows()[1][:, :count].expand(len(prompt), -1)
    with torch.no_grad():
        model(prompt, **given)
        for token in later.split(1, 1):
            found.append(model(token, **given).logits)
    return torch.cat(found, 1)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count for how many texts blocks ran."""
    seen: list[int] = []

    def counted(own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counting(self: NativeBlock, x: torch.Tensor, *args: Any) -> torch.Tensor:
            seen.append(len(x))
            return own(self, x, *args)

        return counting

    for name in ("append_token", "next_token"):
        monkeypatch.setattr(NativeBlock, name, counted(getattr(NativeBlock, name)))
    return seen


def close(found: torch.Tensor, expected: torch.Tensor, step: float = 1 / 127) -> bool:
    """Whether outputs are the same but for an input that is rounded to another number."""
    return bool((found - expected).norm() <= 1.25 * step * expected.norm())


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 14},
    "Qwen2": {"use_sliding_window": False},
}


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_next_token_is_the_same_by_the_kernels(
    kind: str, texts: int, tokens: list[int]
) -> None:
    prompt = windows()[:texts, 0, :10]
    expected = steps(packed(model_of(kind, **FAMILIES[kind]), fused=False), prompt)
    model = packed(model_of(kind, **FAMILIES[kind]))
    found = steps(model, prompt)

    # while backends are chosen for the first token, blocks run by themselves; Mistral's window is
    # full when the last one comes
    assert tokens == [texts] * 3 * (2 if kind == "Mistral" else 3)
    assert close(found, expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_models_in_bfloat16_generate_by_the_kernels_too(kind: str, tokens: list[int]) -> None:
    """That is how most models are published."""
    prompt = windows()[:3, 0, :10]
    model = packed(model_of(kind, **FAMILIES[kind]).bfloat16())
    wide = copy.deepcopy(model).float()
    unfuse(wide)
    with using("portable"):
        exact = steps(wide, prompt)
    found = steps(model, prompt)

    assert tokens == [3] * 3 * (2 if kind == "Mistral" else 3)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static", "w4a8"])
def test_quantized_inputs_are_the_same_by_the_kernels(scheme: str, tokens: list[int]) -> None:
    prompt = windows()[0][:, :10]
    expected = steps(packed(llama(), fused=False, scheme=scheme), prompt)
    found = steps(packed(llama(), scheme=scheme), prompt)

    assert len(tokens) == 4 * 3
    assert close(found, expected)


@pytest.mark.parametrize(("scheme", "step"), [("fp8", 1 / 16), ("nvfp4", 1 / 127)])
def test_inputs_that_the_kernel_does_not_quantize_are_left_to_others(
    scheme: str, step: float, tokens: list[int]
) -> None:
    prompt = windows()[0][:, :10]
    expected = steps(packed(llama(), fused=False, scheme=scheme), prompt)

    assert close(steps(packed(llama(), scheme=scheme), prompt), expected, step)
    assert tokens == []


def test_a_block_with_another_formula_is_left_alone(tokens: list[int]) -> None:
    granite = model_of("Granite", residual_multiplier=0.5)
    qwen3 = model_of("Qwen3", head_dim=32)

    assert "block" not in fuse(granite).values()
    assert "block" not in fuse(qwen3).values()


@pytest.mark.parametrize("case", ["hook", "mask", "eager", "autocast", "many texts", "static"])
def test_whoever_asks_for_more_gets_the_own_forward(case: str, tokens: list[int]) -> None:
    model, plain = packed(llama()), packed(llama(), fused=False)
    texts = 9 if case == "many texts" else 1
    prompt, token = windows()[:texts, 0, :10], windows()[:texts, 0, 10:11]
    found, seen = [], []
    for own in (model, plain):
        more: dict[str, Any] = {}
        if case == "hook":
            for layer in own.model.layers:
                layer.mlp.up_proj.register_forward_hook(lambda m, i, o: seen.append(o))
        if case == "eager":
            own.set_attn_implementation("eager")
        if case == "mask":
            more["attention_mask"] = torch.tensor([[0] * 3 + [1] * 7])
        cache: Any = transformers.DynamicCache()
        if case == "static":
            cache = transformers.StaticCache(own.config, max_cache_len=24)
        given: dict[str, Any] = {cache_argument(own): cache, "use_cache": True}
        with torch.no_grad(), torch.autocast("cpu", enabled=case == "autocast"):
            own(prompt, **given, **more)
            for _ in range(3):
                if more:
                    more["attention_mask"] = nn.functional.pad(
                        more["attention_mask"], (0, 1), value=1
                    )
                logits = own(token, **given, **more).logits
        found.append(logits)

    assert tokens == []
    assert len(seen) == (32 if case == "hook" else 0)
    assert close(found[0].float(), found[1].float())


def test_a_tensor_that_is_replaced_is_read_anew(tokens: list[int]) -> None:
    model, other = packed(llama()), llama()
    prompt = windows()[0][:, :10]
    steps(model, prompt)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    state = packed(other, fused=False).state_dict()
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        tokens.clear()
        found = steps(model, prompt)
        assert len(tokens) >= 12

        again = packed(llama(), fused=False)
        again.load_state_dict(state)
        assert close(found, steps(again, prompt))


def test_a_block_that_ran_can_be_copied_pickled_and_taken_back(tokens: list[int]) -> None:
    model, prompt = packed(llama()), windows()[0][:, :10]
    expected = steps(model, prompt)
    assert tokens

    assert torch.equal(steps(copy.deepcopy(model), prompt), expected)
    kept = model.model.layers[0].__dict__["_native_block"]
    assert pickle.loads(pickle.dumps(kept)).block is None
    tokens.clear()
    unfuse(model)
    assert close(steps(model, prompt), expected)
    assert tokens == []
    assert "_native_block" not in model.model.layers[0].__dict__


def test_blocks_are_recorded_and_restored(tokens: list[int]) -> None:
    model, prompt = packed(llama()), windows()[0][:, :10]
    state = modewright.mode_state(model)
    other: Any = modewright.restore_from_mode_state(llama(), state)
    other.load_state_dict(model.state_dict())
    expected = steps(model, prompt)
    tokens.clear()

    assert list(state["modes"][-1]["metadata"]["fused"].values()).count("block") == 4
    assert torch.equal(steps(other, prompt), expected)
    assert tokens


def test_a_part_that_was_exchanged_runs_by_itself(tokens: list[int]) -> None:
    model, prompt = packed(llama()), windows()[0][:, :10]
    steps(model, prompt)
    tokens.clear()
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    steps(model, prompt)

    assert tokens == []


def test_kernels_that_are_switched_off_no_longer_serve_a_block_that_ran(
    tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = packed(llama()), windows()[0][:, :10]
    expected = steps(model, prompt)
    assert tokens
    tokens.clear()
    monkeypatch.setenv(SWITCH, "0")

    assert close(steps(model, prompt), expected)
    assert tokens == []


def test_generation_chooses_the_same_tokens(tokens: list[int]) -> None:
    model = packed(llama())
    texts = []
    for _ in range(2):
        decoding = Decoding(model, windows()[0][:, :12])
        texts.append([int(decoding.step()) for _ in range(8)])
        unfuse(model)

    assert texts[0] == texts[1]
    assert len(tokens) == 4 * 7
