# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modewright.errors import DataError, SearchError
from modewright.pruning.depth.blocks import (
    choose_blocks,
    make_skippable,
    removed,
    skip_blocks,
    skipped_blocks,
)
from modewright.pruning.depth.searcher import DepthSearcher
from modewright.pruning.effect import Effect
from support.models import Block

BATCHES = list(torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(3)))


class Deep(nn.Module):
    """Blocks that differ in how much they do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(6, 10) for _ in range(6)])
        for block, strength in zip(self.blocks, (3.0, 0.1, 1.0, 0.05, 2.0, 0.5), strict=True):
            block.fc2.weight.data.mul_(strength)
            block.fc2.bias.data.mul_(strength)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


BLOCK = sum(p.numel() for p in Block(6, 10).parameters())


def deep() -> Deep:
    torch.manual_seed(0)
    model = Deep().eval()
    make_skippable(model, choose_blocks(model, ["*"], [])[0])
    return model


def search(model: nn.Module, blocks: int, **config: Any) -> dict[str, Any]:
    options = {"calibration": BATCHES, **config}
    return DepthSearcher().search(model, {"params": blocks * BLOCK}, BATCHES[0], options)


def effect_without(paths: list[str]) -> float:
    model = deep()
    effect = Effect(model, BATCHES)
    skip_blocks(model, paths)
    return effect(model)


def test_blocks_that_matter_least_are_dropped_until_the_constraint_holds() -> None:
    model = deep()
    best = search(model, 3)

    assert best["dropped"][:2] == ["blocks.3", "blocks.1"]
    assert skipped_blocks(model) == sorted(best["dropped"])
    assert best["costs"] == {"params": 3.0 * BLOCK}
    assert best["effect"] == pytest.approx(effect_without(best["dropped"]))


def test_every_choice_is_the_best_one_of_that_round() -> None:
    best = search(deep(), 2, retries=10)
    paths = [f"blocks.{place}" for place in range(6)]

    for count, chosen in enumerate(best["dropped"]):
        before = best["dropped"][:count]
        effects = {p: effect_without([*before, p]) for p in paths if p not in before}
        assert chosen == min(effects, key=lambda path: effects[path])


def test_lazy_search_finds_what_trying_everything_does_with_fewer_runs() -> None:
    lazy, thorough = DepthSearcher(), DepthSearcher()
    options = {"calibration": BATCHES}
    lazy.search(deep(), {"params": "50%"}, BATCHES[0], {**options, "retries": 1})
    thorough.search(deep(), {"params": "50%"}, BATCHES[0], {**options, "retries": 10})

    assert lazy.best["dropped"] == thorough.best["dropped"]
    assert len(lazy.effects) < len(thorough.effects)


def test_greedy_choice_is_near_the_best_of_all_pairs() -> None:
    best = search(deep(), 4)
    pairs = combinations([f"blocks.{place}" for place in range(6)], 2)

    assert best["effect"] <= 1.05 * min(effect_without(list(pair)) for pair in pairs)


def test_a_search_that_was_killed_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = DepthSearcher()
    expected.search(deep(), {"params": 3 * BLOCK}, BATCHES[0], {"calibration": BATCHES})
    path = tmp_path / "search.safetensors"
    runs = 0

    def limited(self: Effect, model: nn.Module, own: Any = Effect.__call__) -> float:
        nonlocal runs
        runs += 1
        if runs == 9:
            raise KeyboardInterrupt
        return own(self, model)

    monkeypatch.setattr(Effect, "__call__", limited)
    with pytest.raises(KeyboardInterrupt):
        search(deep(), 3, checkpoint=path)
    resumed = DepthSearcher()
    options = {"calibration": BATCHES, "checkpoint": path}
    resumed.search(deep(), {"params": 3 * BLOCK}, BATCHES[0], options)

    assert resumed.state_dict() == expected.state_dict()
    assert runs == 1 + len(expected.effects)  # nothing but the killed one was done again


def test_what_was_measured_serves_other_constraints(tmp_path: Path) -> None:
    path = tmp_path / "search.safetensors"
    search(deep(), 2, checkpoint=path)
    searcher = DepthSearcher()
    options = {"calibration": BATCHES, "checkpoint": path}
    best = searcher.search(deep(), {"params": 4 * BLOCK}, BATCHES[0], options)

    assert best == search(deep(), 4)


def test_several_constraints_hold_together() -> None:
    model = deep()
    bounds = {"params": "90%", "flops": "50%"}
    searcher = DepthSearcher()
    best = searcher.search(model, bounds, BATCHES[0], {"calibration": BATCHES})

    assert len(best["dropped"]) == 3
    with removed(model, best["dropped"]):
        assert len(model.blocks) == 3
    assert [len(point["subnet"]) for point in searcher.points] == [1, 2, 3]


def test_a_score_of_the_callers_own_decides() -> None:
    def score(model: nn.Module) -> float:  # the block that does most is the one to go
        return float((model(BATCHES[0]) - BATCHES[0]).square().mean().neg())

    model = deep()
    best = search(model, 5, score_func=torch.no_grad()(score))

    assert best["dropped"] == ["blocks.0"]


def test_an_unreachable_constraint_is_refused_before_anything_is_tried() -> None:
    searcher = DepthSearcher()
    with pytest.raises(SearchError, match=f"params = {BLOCK}"):
        searcher.search(deep(), {"params": 10}, BATCHES[0], {"calibration": BATCHES})
    assert not searcher.effects


def test_data_is_needed() -> None:
    with pytest.raises(DataError, match="pass calibration="):
        search(deep(), 3, calibration=None)


def test_a_limit_on_trials_is_kept() -> None:
    searcher = DepthSearcher()
    options = {"calibration": BATCHES, "max_trials": 2}
    best = searcher.search(deep(), {"params": 2 * BLOCK}, BATCHES[0], options)

    assert len(best["dropped"]) == 4
    assert len(searcher.effects) < 15
