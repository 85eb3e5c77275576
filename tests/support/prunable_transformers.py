# SPDX-License-Identifier: Apache-2.0
"""Tiny Transformers models of the families that pruning must know, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4}
_TEXT = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_PAIRS = {"num_key_value_heads": 2}

TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_SMALL, **_HEADS, **_TEXT, **_PAIRS}),
    "llama_tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_SMALL, **_HEADS, **_TEXT, **_PAIRS, "tie_word_embeddings": True},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_SMALL, **_HEADS, **_TEXT, **_PAIRS, "num_local_experts": 4},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **_TEXT},
    ),
    "bert": ("BertModel", "BertConfig", {**_SMALL, **_HEADS, "vocab_size": 64}),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**_SMALL, **_HEADS, "image_size": 16, "patch_size": 4},
    ),
}


def build_transformer(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a model in eval mode and an input for it."""
    import transformers

    model_class, config_class, options = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that are not trivial, too
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if name == "vit":
        return model.eval(), {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return model.eval(), {"input_ids": torch.randint(0, 64, (2, 7), generator=generator)}
