# SPDX-License-Identifier: Apache-2.0
"""Searching what a mode opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import ConfigError, IncompatibleModeError, SearchError, UnknownModeError
from modewright.modes.registry import ModeRegistry
from modewright.modes.search import SearchPoint, SearchResult
from support.models import MLP
from support.photograph import contents
from support.search_modes import search_registry

WIDTHS = 12 * (2 * 8 + 1)  # numbers of one block's layers, the last bias apart
FULL = sum(p.numel() for p in MLP.make().parameters())


@pytest.fixture
def registry() -> ModeRegistry:
    return search_registry()


def search(registry: ModeRegistry, model: Any = None, bound: Any = "60%", **more: Any) -> Any:
    model = MLP.make() if model is None else model
    more = {"dummy_input": MLP.inputs, **more}
    return modewright.search(model, "elastic", {"params": bound}, registry=registry, **more)


def test_the_mode_is_applied_searched_and_the_model_is_set_to_the_best(
    registry: ModeRegistry,
) -> None:
    result = search(registry)

    assert modewright.last_mode(result.model) == "elastic"
    widths = {f"blocks.{i}": block.width for i, block in enumerate(result.model.blocks)}
    assert widths == result.best["subnet"]
    assert result.costs["params"] <= result.bounds["params"] == pytest.approx(0.6 * FULL)
    assert result.constraints == {"params": "60%"}
    assert len(result.points) == 9


def test_the_best_is_the_best_of_all_points_that_fit(registry: ModeRegistry) -> None:
    result = search(registry)
    fitting = [p for p in result.points if p.costs["params"] <= result.bounds["params"]]

    assert result.best["score"] == max(point.score for point in fitting)
    assert any(p.score > result.best["score"] for p in result.points)


def test_what_was_chosen_is_saved_restored_and_exported(
    registry: ModeRegistry, tmp_path: Path
) -> None:
    model = search(registry).model
    expected = MLP.run(model)
    path = modewright.save(model, tmp_path / "m.safetensors")
    restored = modewright.restore(MLP.make(), path, registry=registry)
    exported = modewright.apply_mode(restored, "export_elastic", registry=registry)

    assert torch.equal(MLP.run(exported), expected)
    assert sum(p.numel() for p in exported.parameters()) <= 0.6 * FULL


def test_an_open_space_is_searched_again_without_applying_the_mode(registry: ModeRegistry) -> None:
    first = search(registry, bound="90%")
    second = search(registry, first.model, bound="60%")

    assert second.model is first.model
    assert [m["name"] for m in modewright.mode_state(second.model)["modes"]] == ["elastic"]
    assert second.best == search(registry).best


def test_an_open_space_is_not_taken_for_one_of_another_config(registry: ModeRegistry) -> None:
    model = modewright.apply_mode(MLP.make(), ("elastic", {"choices": [4, 8]}), registry=registry)
    same = ("elastic", {"choices": [4, 8]})
    modewright.search(model, same, {"params": "80%"}, dummy_input=MLP.inputs, registry=registry)

    with pytest.raises(IncompatibleModeError, match="choices differ"):
        modewright.search(
            model, ("elastic", {"choices": [4]}), {"params": "80%"}, registry=registry
        )


def test_unreachable_constraint_is_said_before_the_search_and_undoes_the_mode(
    registry: ModeRegistry,
) -> None:
    model = MLP.make()
    before = contents(model)
    smallest = FULL - 2 * WIDTHS * 8 // 12

    with pytest.raises(SearchError, match=f"params <= 10 .*params = {smallest}"):
        search(registry, model, bound=10, score_func=lambda m: pytest.fail("searched"))
    assert contents(model) == before
    assert not modewright.is_converted(model)


def test_a_search_that_was_killed_gives_the_answer_of_one_that_was_not(
    registry: ModeRegistry, tmp_path: Path
) -> None:
    path = tmp_path / "search"
    whole = search(registry)
    model = MLP.make()
    with pytest.raises(KeyboardInterrupt):
        search(registry, model, checkpoint=path, config={"stop_after": 4})
    assert not modewright.is_converted(model)
    resumed = search(registry, model, checkpoint=path)

    assert resumed.best == whole.best
    assert resumed.points == whole.points


def test_score_and_loss_functions_decide(registry: ModeRegistry) -> None:
    narrowest = search(registry, score_func=lambda m: -sum(b.width for b in m.blocks))
    assert set(narrowest.best["subnet"].values()) == {4}

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return -model(batch).square().mean()

    chosen = search(registry, loss_func=loss, calibration=MLP.batches)
    assert chosen.best["score"] == max(
        p.score for p in chosen.points if p.costs["params"] <= chosen.bounds["params"]
    )


def test_without_an_input_the_first_batch_is_taken(registry: ModeRegistry) -> None:
    assert search(registry, dummy_input=None, calibration=MLP.batches).best == search(registry).best


def test_trials_are_limited_and_shown(registry: ModeRegistry) -> None:
    shown: list[Any] = []
    result = search(registry, max_trials=3, on_trial=lambda *a: shown.append(a))

    assert len(result.points) == 3
    assert shown == [(1, 9), (2, 9), (3, 9)]


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("quantize", SearchError),
        ("elastik", UnknownModeError),
        (["elastic", "elastic"], SearchError),
        ([], SearchError),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_refused(mode: Any, error: type[Exception]) -> None:
    registry = search_registry()
    registry.register(modewright.default_registry["quantize"])

    with pytest.raises(error):
        modewright.search(MLP.make(), mode, {"params": 3}, registry=registry)


def test_unknown_option_is_refused_before_the_mode_is_applied(registry: ModeRegistry) -> None:
    model = MLP.make()
    with pytest.raises(ConfigError, match="stop_aftr"):
        search(registry, model, config={"stop_aftr": 3})
    assert not modewright.is_converted(model)


def test_wrapped_model_and_recipe_of_a_model_are_searched(registry: ModeRegistry) -> None:
    wrapped = nn.DataParallel(MLP.make())
    result = search(registry, wrapped)

    assert result.model is wrapped
    assert result.best == search(registry, MLP.make).best


# --- the Pareto front ----------------------------------------------------------------------------


def point(score: float, **costs: float) -> SearchPoint:
    return SearchPoint(costs=costs, score=score, subnet=None)


def result(constraints: dict[str, Any], *points: SearchPoint) -> SearchResult:
    return SearchResult(
        model=nn.Identity(),
        mode="m",
        best={},
        costs={},
        constraints=constraints,
        bounds={},
        points=points,
    )


def test_pareto_points_are_those_that_no_other_beats_the_cheapest_first() -> None:
    a, b, c, d = point(1, params=1), point(3, params=2), point(2, params=3), point(4, params=9)

    assert result({"params": 5}, d, c, b, a, b).pareto() == (a, b, d)


def test_only_bounded_costs_count_for_the_front() -> None:
    a, b = point(1, params=1, flops=9), point(2, params=2, flops=5)

    assert result({"params": 5}, a, b).pareto() == (a, b)
    assert result({"flops": 5}, a, b).pareto() == (b,)
    assert result({"params": 5, "flops": 5}, a, b).pareto() == (a, b)
    assert result({"params": 5}).pareto() == ()


def test_every_visited_point_is_on_the_front_or_beaten_by_one_on_it(
    registry: ModeRegistry,
) -> None:
    found = search(registry)
    front = found.pareto()

    for visited in found.points:
        assert any(
            p.score >= visited.score and p.costs["params"] <= visited.costs["params"] for p in front
        )
    scores = [p.score for p in front]
    assert scores == sorted(scores)
    assert found.to_dict()["visited"] == 9
