# SPDX-License-Identifier: Apache-2.0
"""A pruned model of Transformers has a config from which the same model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.pruning import export
from modewright.pruning.config_search import cut_lengths, find_entries
from modewright.pruning.graph import trace_dimensions
from modewright.pruning.model_config import config_problem, replace_config, set_entries
from modewright.pruning.space import choose, open_space
from modewright.pruning.surgery import cut, plan_cut
from support.prunable_lms import batches, lm, logits

KINDS = ["llama", "qwen2", "gemma3", "gpt2", "neox", "opt"]
BATCH = batches(1)[0]
SHARES = {"ffn": 2 / 3, "heads": 2 / 3, "hidden": 0.5}


def cut_all(model: Any, *kinds: str) -> dict[str, Any] | None:
    """Cut every dimension of some kinds by as much; return the new entries of the config."""
    graph = trace_dimensions(model, BATCH)
    kept = {
        group.name: range(round(group.size * SHARES[group.kind]))
        for group in graph.groups
        if group.kind in kinds
    }
    plan = plan_cut(model, graph.groups, kept)
    lengths = cut_lengths(model, plan.kept)
    cut(model, plan)
    return find_entries(model, lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_blocks_leave_a_config_that_builds_the_same_model(kind: str) -> None:
    model = modewright.apply_mode(lm(kind), "depth")
    paths = list(modewright.mode_state(model)["modes"][0]["metadata"]["blocks"])
    searched = modewright.search(model, "depth", {"params": "80%"}, calibration=batches(2)).model
    expected = logits(searched, BATCH)
    exported = modewright.apply_mode(searched, "export_prune")

    assert len(paths) == 4
    assert exported.config.num_hidden_layers < 4
    assert config_problem(exported) is None
    torch.testing.assert_close(logits(exported, BATCH), expected)


def test_lists_with_an_entry_for_each_block_lose_those_of_dropped_blocks() -> None:
    model = modewright.apply_mode(lm("qwen2"), "depth")
    for place in (0, 2):
        model.model.layers[place].skipped = True
    exported: Any = modewright.apply_mode(model, "export_prune")

    assert exported.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in exported.model.layers] == [0, 1]


def test_a_pruned_model_generates_the_same_with_and_without_cache() -> None:
    model = modewright.apply_mode(lm("qwen2"), "depth")
    model.model.layers[0].skipped = True
    exported: Any = modewright.apply_mode(model, "export_prune")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

    with_cache = exported.generate(**BATCH, **options, use_cache=True)
    assert torch.equal(with_cache, exported.generate(**BATCH, **options, use_cache=False))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_heads_and_inner_width_follow(kind: str) -> None:
    model = lm(kind)
    entries = cut_all(model, "ffn", "heads")
    assert entries is not None
    set_entries(model, entries)

    assert (model.config.intermediate_size, model.config.num_key_value_heads) == (64, 2)
    assert model.config.num_attention_heads == 4
    assert config_problem(model) is None


def test_a_head_keeps_its_width_where_the_config_derived_it() -> None:
    entries = cut_all(lm("qwen2"), "heads")

    assert entries == {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def test_an_inner_width_that_was_not_set_is_set() -> None:
    assert cut_all(lm("gpt2"), "ffn") == {"n_inner": 128}


def test_what_a_config_cannot_say_is_not_found_and_the_config_stays() -> None:
    model = lm("opt")  # the width of a head follows from the hidden width there
    before = model.config.to_dict()

    assert cut_all(model, "heads") is None
    assert model.config.to_dict() == before


def test_a_config_that_builds_another_computation_is_found_out() -> None:
    model = lm("gemma3")  # multiplies embeddings by the root of the hidden width
    entries = cut_all(model, "hidden")
    assert entries == {"hidden_size": 24}
    set_entries(model, entries)

    assert "gives other logits" in str(config_problem(model))


def test_widths_that_differ_between_blocks_are_reported_by_the_export() -> None:
    model = lm("llama")
    graph = trace_dimensions(model, BATCH)
    first = next(group for group in graph.groups if group.kind == "ffn")
    open_space(model)
    choose(model, graph.groups, {first.name: range(32)})
    metadata = export.convert(model)

    assert metadata["config"] is None
    assert [item["module"] for item in metadata["skipped"]] == ["config.json"]
    assert "from_pretrained does not load it" in metadata["skipped"][0]["reason"]


def test_the_config_is_copied_before_it_is_edited() -> None:
    model = lm("llama")
    shared, before = model.config, model.config.to_dict()
    replace_config(model)
    set_entries(model, {"intermediate_size": 8})

    assert shared.to_dict() == before
    assert model.unpruned_config is shared
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_a_failed_export_leaves_the_config_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = modewright.apply_mode(lm("llama"), "depth")
    model.model.layers[0].skipped = True
    config, expected = model.config, logits(model, BATCH)

    def fail(model: nn.Module) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(export, "config_problem", fail)
    with pytest.raises(modewright.errors.ApplyModeError):
        modewright.apply_mode(model, "export_prune")

    assert model.config is config
    assert config.num_hidden_layers == 4
    assert torch.equal(logits(model, BATCH), expected)


def test_a_pruned_model_is_restored_from_its_record(tmp_path: Path) -> None:
    searched = modewright.search(
        lm("qwen2"), ("minitron", {"divisor": 8}), {"params": "70%"}, calibration=batches(2)
    ).model
    exported = modewright.apply_mode(searched, "export_prune")
    modewright.save(exported, tmp_path / "model.safetensors")
    restored: Any = modewright.restore(lm("qwen2"), tmp_path / "model.safetensors")

    assert torch.equal(logits(restored, BATCH), logits(exported, BATCH))
    assert restored.config.to_dict() == exported.config.to_dict()
