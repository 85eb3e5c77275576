# SPDX-License-Identifier: Apache-2.0
"""A recipe's step with a search: what the run brings, keeps and shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modewright
from modewright.errors import ConfigError, SearchError
from modewright.modes.registry import ModeRegistry
from modewright.run.optimize import dry_run, optimize
from modewright.run.searching import next_token_loss
from support.models import LM, MLP
from support.search_modes import ElasticMode, ElasticSearcher, ExportElasticMode

WINDOWS = torch.arange(96).reshape(4, 24) % 20
BATCHES = list(WINDOWS.split(1))


@pytest.fixture
def registry() -> ModeRegistry:
    registry = modewright.default_registry.copy()
    registry.register(ElasticMode)
    registry.register(ExportElasticMode)
    return registry


def recipe(bound: Any = "80%", **more: Any) -> dict[str, Any]:
    step = {"mode": "elastic", "search": {"constraints": {"params": bound}}, **more}
    return {"name": "narrow", "steps": [step, "export_elastic"]}


def run(registry: ModeRegistry, asked: dict[str, Any], **more: Any) -> Any:
    model = more.pop("model", None) or LM.make()
    return optimize(
        model, asked, registry=registry, calibration=BATCHES, evaluation=WINDOWS, **more
    )


def test_step_is_searched_and_the_next_one_exports_what_was_chosen(registry: ModeRegistry) -> None:
    result = run(registry, recipe())
    (found,) = result.searches
    numbers = sum(p.numel() for p in result.model.parameters())

    assert numbers == found.costs["params"] <= found.bounds["params"]
    assert [step.name for step in result.steps][3:5] == ["elastic", "export_elastic"]
    assert result.restored_identical
    assert result.to_dict()["searches"][0]["constraints"] == {"params": "80%"}


def test_language_models_are_scored_by_the_tokens_they_predict(registry: ModeRegistry) -> None:
    (found,) = run(registry, recipe()).searches
    model = LM.make()
    modewright.apply_mode(model, "elastic", registry=registry)
    model.block.width = found.best["subnet"]["block"]
    with torch.no_grad():
        losses = [F.cross_entropy(model(b)[0, :-1], b[0, 1:]) for b in BATCHES]

    assert found.best["score"] == pytest.approx(-float(sum(losses)) / len(losses), rel=1e-5)


def test_run_that_was_killed_in_a_search_goes_on_from_the_points_visited(
    registry: ModeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit, visits = ElasticSearcher.visit, []

    def killed(self: Any, *args: Any) -> None:
        if len(visits) == 2:
            raise KeyboardInterrupt
        visits.append(args)
        visit(self, *args)

    monkeypatch.setattr(ElasticSearcher, "visit", killed)
    with pytest.raises(KeyboardInterrupt):
        run(registry, recipe(), output=tmp_path / "out")
    visits[:] = [None] * 3  # no longer two
    result = run(registry, recipe(), output=tmp_path / "out")

    assert len(visits) == 4
    assert result.searches[0].points == run(registry, recipe()).searches[0].points


def test_search_that_cannot_succeed_gives_way_to_its_fallback(registry: ModeRegistry) -> None:
    asked = recipe(3, fallback=[{"mode": "quantize", "config": {"scheme": "w8a16"}}])
    asked["steps"] = asked["steps"][:1]
    result = run(registry, asked)
    (step,) = (s for s in result.steps if s.name == "quantize")

    assert step.fallback_for == "elastic"
    assert "closest that can be reached" in (step.fallback_reason or "")
    assert [m["name"] for m in modewright.mode_state(result.model)["modes"]] == ["quantize"]


def test_search_without_a_fallback_says_what_can_be_reached(registry: ModeRegistry) -> None:
    with pytest.raises(SearchError, match="closest that can be reached"):
        run(registry, recipe(3))


def test_costs_are_measured_on_as_many_tokens_as_are_asked_for(
    registry: ModeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    before = ElasticSearcher.before_search
    monkeypatch.setattr(
        ElasticSearcher,
        "before_search",
        lambda self: (seen.append(self.dummy_input.shape), before(self)),
    )
    asked = recipe()
    run(registry, asked)
    asked["steps"][0]["search"]["input_length"] = 1
    run(registry, asked)

    assert seen == [(1, 24), (1, 1)]


def test_dry_run_shows_the_bounds(registry: ModeRegistry) -> None:
    shown = str(dry_run(LM.make(), recipe(), registry=registry))

    assert "search: params <= 80%" in shown


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mode": "mse"}, "has no search"),
        ({"search": {"constraints": {"params": "much"}}}, "positive number"),
        ({"search": {"constraints": {}}}, "at least 1"),
        ({"search": {"constraints": {"params": 3}, "options": {"stop_aftr": 1}}}, "'stop_after'"),
        ({"search": {"constraints": {"params": 3}, "options": {"calibration": 1}}}, "its own"),
    ],
    ids=str,
)
def test_recipes_with_mistakes_are_refused_before_anything_is_loaded(
    change: dict[str, Any], text: str, registry: ModeRegistry
) -> None:
    asked = recipe()
    asked["steps"] = [{**asked["steps"][0], **change}]

    with pytest.raises(ConfigError, match=text):
        dry_run("no such model", asked, registry=registry)


def test_next_token_loss_is_the_mean_cross_entropy() -> None:
    model, ids = LM.make(), WINDOWS[:2]
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    assert torch.allclose(next_token_loss(model, ids), expected)


@pytest.mark.parametrize("batch", [MLP.inputs, (WINDOWS,), {"x": WINDOWS}, WINDOWS[0]], ids=type)
def test_batches_without_tokens_are_refused_with_what_to_do(batch: Any) -> None:
    with pytest.raises(ConfigError, match="score_func"):
        next_token_loss(LM.make(), batch)


def test_models_without_logits_for_tokens_are_refused() -> None:
    class Pooled(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(ids), 3)

    with pytest.raises(ConfigError, match="logits"):
        next_token_loss(Pooled(), WINDOWS)
