# SPDX-License-Identifier: Apache-2.0
"""Every recipe of the library, run to the end on small models: it restores and works."""

from __future__ import annotations

import pytest
import torch

import modewright
from modewright.recipes.loader import recipe_names
from support.library_recipes import VOCABULARY, llama, quick, windows


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_the_library_runs_to_the_end(name: str) -> None:
    ids, model = windows(), llama()
    before = model(ids[-1]).logits

    result = modewright.optimize(
        model, quick(name), calibration=list(ids[:12]), evaluation=ids[12:, 0]
    )

    after = result.model(ids[-1]).logits
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
    ids = windows()

    result = modewright.optimize(
        model, quick(name), calibration=list(ids[:12]), evaluation=ids[12:, 0]
    )

    assert result.restored_identical
    assert result.similarity is not None
    assert 0.5 < result.similarity < 1
