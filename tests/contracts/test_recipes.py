# SPDX-License-Identifier: Apache-2.0
"""Every recipe of the library, run to the end on small models: it restores and works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.recipes.loader import load_recipe, recipe_names
from modewright.recipes.schema import Recipe

VOCABULARY = 64
QUICK = {
    # mode: config that takes less time than the recipe's, and asks for less data
    "learned_rounding": {"iterations": 2},
    "gptq": {"min_tokens": 1},
    "sparsegpt": {"min_tokens": 1},
}


def llama() -> nn.Module:
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


def quick(name: str) -> Recipe:
    recipe = load_recipe(name)
    steps = []
    for step in recipe.steps:
        config: dict[str, Any] = {**step.config, **QUICK.get(step.mode, {})}
        known = modewright.default_registry[step.mode].config_class.model_fields
        config = {key: value for key, value in config.items() if key in known}
        steps.append(step.model_copy(update={"config": config}))
    return recipe.model_copy(update={"steps": tuple(steps)})


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_the_library_runs_to_the_end(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(VOCABULARY, (14, 1, 24), generator=generator)
    model = llama()
    before = model(windows[-1]).logits

    result = modewright.optimize(
        model, quick(name), calibration=list(windows[:12]), evaluation=windows[12:, 0]
    )

    after = result.model(windows[-1]).logits
    assert result.restored_identical
    assert result.optimized is not None
    assert after.shape == before.shape
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)  # something was done
    assert torch.nn.functional.cosine_similarity(after, before, dim=-1).mean() > 0.5


FOR_LANGUAGE_MODELS = ("auto-", "prune-", "kv8")  # they need a head, a cache, or blocks to drop


@pytest.mark.parametrize(
    "name", [name for name in recipe_names() if not name.startswith(FOR_LANGUAGE_MODELS)]
)
def test_a_recipe_of_the_library_optimizes_an_encoder(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(VOCABULARY, (14, 1, 24), generator=generator)

    result = modewright.optimize(
        model, quick(name), calibration=list(windows[:12]), evaluation=windows[12:, 0]
    )

    assert result.restored_identical
    assert result.similarity is not None
    assert 0.5 < result.similarity < 1
