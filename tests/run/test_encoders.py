# SPDX-License-Identifier: Apache-2.0
"""Runs on networks that are no language models: they are measured by the outputs they keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from modewright.errors import DataError
from modewright.modes.registry import ModeRegistry
from modewright.recipes.loader import load_recipe
from modewright.run.bench import bench
from modewright.run.data import load_data
from modewright.run.optimize import optimize
from modewright.run.subject import open_subject
from support.language_models import save_tiny_encoder, tiny_recipe

pytest.importorskip("transformers")

W8A16 = {"mode": "quantize", "config": {"scheme": "w8a16"}}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return save_tiny_encoder(tmp_path / "encoder")


def test_an_encoder_from_files_is_optimized_measured_and_proven(
    encoder: Path, text: Path, tmp_path: Path
) -> None:
    steps = [{"mode": "quantize", "config": {"scheme": "w8a8_static"}}, {"mode": "max_calibrate"}]
    recipe = tiny_recipe(text, steps=steps, checks={"max_cosine_distance": 0.01})

    result = optimize(encoder, recipe, output=tmp_path / "output")

    assert result.optimized is None
    assert result.baseline is None
    assert result.similarity is not None
    assert 0.99 < result.similarity < 1
    assert result.restored_in == "a fresh process"
    (check,) = result.checks
    assert check.passed
    assert check.value == pytest.approx(1 - result.similarity)
    assert open_subject(tmp_path / "output", registry=modes()).model.config.model_type == "bert"


def test_each_window_is_a_text_with_the_tokens_around_it(encoder: Path, text: Path) -> None:
    recipe = load_recipe(tiny_recipe(text))
    subject = open_subject(encoder, registry=modes())

    data = load_data(recipe, subject, uses_calibration=True)

    assert data.evaluation is not None
    assert data.evaluation.shape == (4, 16)
    assert data.evaluation[:, 0].tolist() == [1] * 4
    assert data.evaluation[:, -1].tolist() == [2] * 4
    assert not subject.predicts_next_token


def test_windows_that_are_longer_than_the_network_takes_are_refused(
    encoder: Path, text: Path
) -> None:
    data = {"source": str(text), "windows": 4, "length": 33}
    recipe = tiny_recipe(text, steps=[W8A16], evaluation=data)
    with pytest.raises(DataError, match=r"33 tokens were asked for.*from 3 to 32"):
        optimize(encoder, recipe)


def test_patterns_that_match_nothing_are_listed_where_the_recipe_allows_it(
    encoder: Path, text: Path
) -> None:
    config = {"scheme": "w8a16", "ignore": ["lm_head"], "on_unmatched": "report"}
    result = optimize(encoder, tiny_recipe(text, steps=[{"mode": "quantize", "config": config}]))

    (skipped,) = result.skipped
    assert (skipped.mode, skipped.module) == ("quantize", "lm_head")
    assert "no module" in skipped.reason


def test_a_network_for_images_is_measured_on_images() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
        images = torch.randn(6, 3, 8, 8)
    recipe = {"name": "images", "steps": [W8A16]}

    result = optimize(network, recipe, evaluation=images)

    assert result.similarity is not None
    assert 0.999 < result.similarity < 1


def test_an_encoder_is_timed_on_whole_texts(encoder: Path) -> None:
    result = bench(encoder, against=encoder, repeats=1, length=64)

    (timing,) = result.models[0].timings
    assert (timing.name, timing.unit) == ("forward", "tokens")


def modes() -> ModeRegistry:
    from modewright.builtin_modes import default_registry

    return default_registry
