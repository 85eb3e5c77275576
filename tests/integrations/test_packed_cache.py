# SPDX-License-Identifier: Apache-2.0
"""Keys and values in a packed cache: the same tokens, a part of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modewright
from modewright.errors import ConfigError

transformers = pytest.importorskip("transformers")

from modewright.integrations.generation import Decoding, cache_argument  # noqa: E402
from modewright.integrations.packed_cache import cache_bytes, packed_cache  # noqa: E402

PROMPT = torch.arange(14).reshape(2, 7)
GROUPS = {"kv_cache": {"num_bits": 4, "symmetric": False, "granularity": "group", "group_size": 8}}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def quantized(scheme: str, rule: dict[str, Any] | None = None) -> Any:
    rules = [] if rule is None else [{"targets": ["LlamaAttention"], **rule}]
    modes = [("quantize", {"scheme": scheme, "rules": rules}), "max_calibrate"]
    return modewright.apply_mode(llama(), modes, mode_kwargs=[{}, {"calibration": [PROMPT]}])


def decoded(model: Any, cache: Any) -> tuple[torch.Tensor, Any]:
    run = Decoding(model, PROMPT, cache)
    return torch.cat([run.tokens, *(run.step() for _ in range(12))], dim=1), run.cache


@pytest.mark.parametrize(
    ("scheme", "rule", "part"),
    [
        ("kv8", None, (16 + 4) / 64),
        ("kv_fp8", None, 16 / 64),
        ("kv8", GROUPS, (8 + 2 * 4 + 2) / 64),
    ],
    ids=["int8", "fp8", "uint4 in groups"],
)
def test_tokens_are_those_of_the_fake_quantized_cache(
    scheme: str, rule: dict[str, Any] | None, part: float
) -> None:
    model = quantized(scheme, rule)
    expected, plain = decoded(model, None)
    tokens, packed = decoded(model, packed_cache(model))

    assert torch.equal(tokens, expected)
    assert packed.get_seq_length() == plain.get_seq_length() == 19
    assert cache_bytes(packed) == cache_bytes(plain) * part


@pytest.mark.parametrize("scheme", ["kv8", "kv_fp8"])
def test_logits_are_the_same_bits(scheme: str) -> None:
    model = quantized(scheme)
    with torch.no_grad():
        expected = model(PROMPT, use_cache=True).logits
        cache = packed_cache(model)
        found = model(PROMPT, use_cache=True, **{cache_argument(model): cache}).logits

    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_takes_it(options: dict[str, Any]) -> None:
    model = quantized("kv8")
    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    expected = model.generate(PROMPT, **common)

    assert torch.equal(
        model.generate(PROMPT, **{cache_argument(model): packed_cache(model)}, **common), expected
    )


def test_it_works_beside_packed_weights() -> None:
    model = llama()
    rules = [{"targets": ["LlamaAttention"], "scheme": "kv8"}]
    modewright.apply_mode(
        model,
        [
            ("quantize", {"scheme": "w8a16", "rules": rules}),
            ("compress", {"scale_dtype": "float32"}),
        ],
    )
    expected, _ = decoded(model, None)

    assert torch.equal(decoded(model, packed_cache(model))[0], expected)


def test_a_model_without_quantized_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv8"):
        packed_cache(llama())


def test_a_scale_that_is_not_calibrated_is_refused() -> None:
    model = modewright.apply_mode(llama(), ("quantize", {"scheme": "kv_fp8"}))
    with pytest.raises(ConfigError, match="Calibrate first"):
        packed_cache(model)
