# SPDX-License-Identifier: Apache-2.0
"""What bench measures, in which order, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import ConfigError, DataError
from modewright.integrations.transformers import load_model, save_assets
from modewright.reports.bench import bench_table
from modewright.run.bench import bench, weight_bytes
from support.language_models import tiny_recipe

SMALL: dict[str, Any] = {"prompt": 4, "length": 8, "tokens": 2, "repeats": 3}
STEPS = [
    {"mode": "quantize", "config": {"scheme": "w4a16", "targets": ["Linear", "Embedding"]}},
    {"mode": "max_calibrate"},
    {"mode": "compress"},
]


class Watched(nn.Module):
    """Notes when it runs."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.name, self.log = name, log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(self.name)
        return self.layer(x)


def test_models_are_measured_in_turn() -> None:
    log: list[str] = []
    result = bench(Watched("a", log), against=Watched("b", log), inputs=torch.ones(5, 4), repeats=3)

    assert log == ["a", "b"] * 4
    own, other = result.models
    assert [t.name for t in own.timings] == ["forward"]
    assert own.timings[0].unit == "samples"
    assert own.timings[0].repeats == 3
    assert own.timings[0].fastest <= own.timings[0].seconds <= own.timings[0].slowest
    assert own.weight_bytes == 20 * 4
    assert own.disk_bytes is None
    assert result.speedup(other, "forward") == 1.0
    expected = other.timings[0].seconds / own.timings[0].seconds
    assert result.to_dict()["models"][0]["timings"][0]["speedup"] == expected


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """What a run writes, in short."""
    loaded = load_model(llama)
    modes = [("quantize", {"scheme": "w4a16", "targets": ["Linear", "Embedding"]}), "compress"]
    modewright.save(modewright.apply_mode(loaded.model, modes), tmp_path / "packed")
    save_assets(loaded.model, loaded.tokenizer, tmp_path / "packed")
    (tmp_path / "packed" / "result.json").write_text(json.dumps({"source": str(llama)}))
    return tmp_path / "packed"


def test_a_written_folder_is_compared_with_its_original(llama: Path, folder: Path) -> None:
    threads = torch.get_num_threads()

    result = bench(folder, threads=1, **SMALL)

    assert result.threads == 1
    assert torch.get_num_threads() == threads
    packed, original = result.models
    assert (packed.name, original.name) == (str(folder), str(llama))
    assert [t.name for t in packed.timings] == ["decode", "prefill"]
    assert packed.weight_bytes < original.weight_bytes / 2
    assert packed.disk_bytes is not None
    assert packed.disk_bytes < original.disk_bytes  # type: ignore[operator]
    assert packed.load_seconds is not None
    json.dumps(result.to_dict())
    assert len(bench_table(result).columns) == 3


def test_a_recipe_is_measured_without_writing_a_folder(llama: Path, text: Path) -> None:
    result = bench(llama, recipe=tiny_recipe(text, steps=STEPS), **SMALL)

    assert [m.name for m in result.models][1] == str(llama)
    assert result.models[0].weight_bytes < result.models[1].weight_bytes / 2


def test_a_model_alone_is_measured_too(llama: Path) -> None:
    result = bench(llama, **SMALL)

    assert len(result.models) == 1
    assert len(bench_table(result).columns) == 2


@pytest.mark.parametrize("content", [None, "{}", "[]", '{"source": 1}', "no JSON"])
def test_a_folder_that_does_not_know_its_original_asks_for_it(
    content: str | None, llama: Path, folder: Path
) -> None:
    (folder / "result.json").unlink()
    if content is not None:
        (folder / "result.json").write_text(content)

    with pytest.raises(DataError, match="--against"):
        bench(folder, **SMALL)


@pytest.mark.parametrize(
    "wrong", [{"repeats": 0}, {"threads": 0}, {"recipe": "w8a8", "against": "x"}, {}], ids=str
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        bench(nn.Linear(2, 2), **wrong)
    with pytest.raises(ConfigError):
        bench(7)


def test_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    model[1].weight = model[0].weight

    assert weight_bytes(model) == 320
