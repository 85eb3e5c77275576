# SPDX-License-Identifier: Apache-2.0
"""Tiny language models of Transformers with several blocks, and tokens for them."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 64
_NAMES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
}
_GROUPED = {"num_key_value_heads": 3}


def lm(kind: str, **changes: Any) -> Any:
    """Return a model that predicts sharply; the same one at every call.

    Args:
        kind: ``llama``, ``qwen2`` (some windowed), ``gemma3``, ``gpt2``, ``neox``, ``opt``.
        changes: Entries of its config.
    """
    import transformers as hf

    windowed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    entries: dict[str, dict[str, Any]] = {
        "llama": {**_SIZES, **_GROUPED, "tie_word_embeddings": True, "initializer_range": 0.2},
        "qwen2": {**_SIZES, **_GROUPED, **windowed, "initializer_range": 0.2},
        "gemma3": {**_SIZES, **_GROUPED, "head_dim": 8, "sliding_window": 8},
        "gpt2": {"n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 64},
        "neox": _SIZES,
        "opt": {
            "hidden_size": 48,
            "ffn_dim": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "word_embed_proj_dim": 48,
        },
    }
    classes = {
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig),
        "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config),
        "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig),
        "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config),
        "neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig),
        "opt": (hf.OPTForCausalLM, hf.OPTConfig),
    }
    model_class, config_class = classes[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**{**_NAMES, **entries[kind], **changes})).eval()


def batches(count: int, length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Return batches of tokens."""
    generator = torch.Generator().manual_seed(5)
    shape = (1, length)
    return [
        {"input_ids": torch.randint(3, VOCABULARY, shape, generator=generator)}
        for _ in range(count)
    ]


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run a model without a cache."""
    with torch.no_grad():
        found: torch.Tensor = model(**batch, use_cache=False).logits
    return found
