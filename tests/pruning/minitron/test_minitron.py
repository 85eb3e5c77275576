# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import modewright
from modewright.errors import DataError, SearchError
from modewright.pruning.effect import Effect
from modewright.pruning.graph import trace_dimensions
from modewright.pruning.minitron.families import families, kept_units
from modewright.pruning.minitron.searcher import MinitronSearcher
from modewright.pruning.width.choices import Choice
from support.prunable_lms import batches, lm, logits

DATA = batches(3)
MODE = ("minitron", {"divisor": 8})


def params(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def search(bound: str = "70%", **more: Any) -> Any:
    model = more.pop("model", None) or lm("llama")
    return modewright.search(model, MODE, {"params": bound}, calibration=DATA, **more)


def test_open_space_computes_what_the_model_did() -> None:
    model = modewright.apply_mode(lm("llama"), MODE)

    assert torch.equal(logits(model, DATA[0]), logits(lm("llama"), DATA[0]))
    assert list(model.state_dict()) == list(lm("llama").state_dict())


def test_what_is_found_fits_and_is_alike_in_all_blocks() -> None:
    whole = params(lm("llama"))
    result = search()
    expected = logits(result.model, DATA[0])
    exported: Any = modewright.apply_mode(result.model, "export_prune")

    assert params(exported) <= 0.7 * whole
    assert params(exported) == result.costs["params"]
    assert len({layer.mlp.down_proj.weight.shape for layer in exported.model.layers}) == 1
    assert exported.config.num_hidden_layers == 4 - len(result.best["dropped"])
    torch.testing.assert_close(logits(exported, DATA[0]), expected)


def test_what_is_found_is_the_best_of_what_was_tried_and_its_effect_is_right() -> None:
    effect = Effect(lm("llama"), DATA)
    result = search()

    assert result.best["effect"] == min(-point.score for point in result.points)
    assert result.best["effect"] == pytest.approx(effect(result.model), rel=1e-4)
    assert all(p.costs["params"] <= result.bounds["params"] for p in result.points)
    assert len({tuple(p.subnet["dropped"]) for p in result.points}) > 1


def test_several_constraints_hold_together() -> None:
    result = modewright.search(
        lm("llama"), MODE, {"params": "90%", "flops": "60%"}, calibration=DATA
    )
    for name, bound in result.bounds.items():
        assert result.costs[name] <= bound


def test_a_search_that_was_killed_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search()
    path = tmp_path / "search.safetensors"
    runs = 0

    def limited(self: Effect, model: Any, own: Any = Effect.__call__) -> float:
        nonlocal runs
        runs += 1
        if runs == 8:
            raise KeyboardInterrupt
        return own(self, model)

    monkeypatch.setattr(Effect, "__call__", limited)
    model = lm("llama")
    before = logits(model, DATA[0])
    with pytest.raises(KeyboardInterrupt):
        search(model=model, checkpoint=path)
    assert torch.equal(logits(model, DATA[0]), before)
    assert modewright.last_mode(model) is None
    resumed = search(checkpoint=path)

    assert resumed.best == expected.best
    assert resumed.points == expected.points


def test_depth_can_be_left_out() -> None:
    result = modewright.search(
        lm("llama"),
        ("minitron", {"divisor": 8, "depth": False}),
        {"params": "80%"},
        calibration=DATA,
    )
    assert result.best["dropped"] == []
    assert min(result.best["widths"].values()) < 96


def test_an_unreachable_constraint_is_refused_with_the_closest() -> None:
    with pytest.raises(SearchError, match="cannot be met"):
        search("1%")


def test_an_input_is_needed() -> None:
    model = modewright.apply_mode(lm("llama"), MODE)
    with pytest.raises(DataError, match="pass dummy_input"):
        MinitronSearcher().search(model, {"params": "70%"})


def test_families_share_a_width_and_keep_the_most_important_units() -> None:
    graph = trace_dimensions(lm("llama"), DATA[0])
    groups = [g for g in graph.groups if g.kind in ("ffn", "heads")]
    steps = {"ffn": 16, "heads": 1}
    heads, ffn = families([Choice(g, steps[g.kind], steps[g.kind]) for g in groups])
    order = {g.name: list(reversed(range(g.size))) for g in groups}

    assert (heads.name, heads.widths) == ("heads 3", [1, 2, 3])
    assert (ffn.name, ffn.widths, len(ffn.members)) == ("ffn 96", [*range(16, 97, 16)], 4)
    kept = kept_units([heads, ffn], [3, 32], order)
    assert kept == {choice.name: list(range(64, 96)) for choice in ffn.members}
