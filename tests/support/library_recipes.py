# SPDX-License-Identifier: Apache-2.0
"""The recipes of the library, made quick, and a small model that each of them can work on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.recipes.loader import load_recipe
from modewright.recipes.schema import Recipe

VOCABULARY = 64
_QUICK = {
    # mode: config that takes less time than the recipe's, and asks for less data
    "learned_rounding": {"iterations": 2},
    "gptq": {"min_tokens": 1},
    "sparsegpt": {"min_tokens": 1},
}


def llama() -> nn.Module:
    """Return a small Llama, the same at every call."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def windows() -> torch.Tensor:
    """Return 14 windows of tokens, ``[14, 1, 24]``."""
    return torch.randint(VOCABULARY, (14, 1, 24), generator=torch.Generator().manual_seed(0))


def quick(name: str) -> Recipe:
    """Return a recipe of the library whose steps take less time."""
    recipe = load_recipe(name)
    steps = []
    for step in recipe.steps:
        config: dict[str, Any] = {**step.config, **_QUICK.get(step.mode, {})}
        known = modewright.default_registry[step.mode].config_class.model_fields
        config = {key: value for key, value in config.items() if key in known}
        steps.append(step.model_copy(update={"config": config}))
    return recipe.model_copy(update={"steps": tuple(steps)})
