# SPDX-License-Identifier: Apache-2.0
"""``modewright search``: what it writes and shows, and that its folder is searched again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import modewright
from modewright.cli.search import command
from modewright.mixed_precision import searcher as searcher_module
from support.command_line import run
from support.language_models import save_tiny_llama, write_text

CANDIDATES = "candidates=[w2a16, w4a16, w8a16]"
DOCS = Path(__file__).parents[2] / "docs" / "search.md"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "llama")


@pytest.fixture
def text(tmp_path: Path) -> list[Any]:
    path = write_text(tmp_path / "text.txt")
    return ["--calibration", path, "--windows", 4, "--length", 16]


def search(*arguments: Any, capsys: Any) -> tuple[int, str, str]:
    return run("search", *arguments, "--mode", "auto_quantize", capsys=capsys)


def test_search_writes_a_model_and_shows_the_points(
    model: Path, text: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, shown, err = search(
        model, "-c", "effective_bits=5", "--config", CANDIDATES, "-o", out, *text, capsys=capsys
    )

    assert code == 0, err
    for words in ("effective bits", "at most", "taken", "w4a16:", "perplexity", "fresh process"):
        assert words in shown
    assert "auto_quantize ..." in err
    assert modewright.verify(out).modes == ("auto_quantize",)
    result = json.loads((out / "result.json").read_text())
    (found,) = result["searches"]
    assert found["costs"]["effective_bits"] <= 5
    assert result["packed_size"] < result["size_before"]


def test_written_folder_is_searched_again_without_scoring(
    model: Path,
    text: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    search(
        model, "-c", "effective_bits=7", "--config", CANDIDATES, "-o", first, *text, capsys=capsys
    )
    monkeypatch.setattr(searcher_module, "gradient_scores", lambda *a, **k: pytest.fail("scored"))
    code, shown, err = search(
        first, "-c", "effective_bits=4", "-o", second, "--json", *text, capsys=capsys
    )

    assert code == 0, err
    (found,) = json.loads(shown)["searches"]
    assert found["costs"]["effective_bits"] <= 4
    modes = modewright.inspect(second).modes
    assert [mode["name"] for mode in modes] == ["auto_quantize"]
    assert modes[0]["metadata"]["outcome"]["constraints"] == {"effective_bits": "4"}


def test_modes_follow_and_several_constraints_hold(
    model: Path, text: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = search(
        model, "-c", "effective_bits=6", "-c", "size_bytes=60%", "--option", "sensitivity=kl",
        "--then", "mse", "--then", "compress", "-o", tmp_path / "out", *text, capsys=capsys,
    )  # fmt: skip

    assert code == 0, err
    assert modewright.verify(tmp_path / "out").modes == ("auto_quantize", "mse", "compress")


def test_checkpoint_keeps_the_scores(
    model: Path,
    text: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = tmp_path / "scores.safetensors"
    again = ["--config", CANDIDATES, "--checkpoint", kept, *text]
    search(model, "-c", "effective_bits=7", *again, capsys=capsys)
    monkeypatch.setattr(searcher_module, "gradient_scores", lambda *a, **k: pytest.fail("scored"))
    code, _, err = search(model, "-c", "effective_bits=4", *again, capsys=capsys)

    assert code == 0, err


def test_dry_run_says_what_would_be_searched(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = search(model, "-c", "effective_bits=4.5", "--dry-run", capsys=capsys)

    assert code == 0
    assert "search: effective_bits <= 4.5" in shown
    assert "each to get one of" in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-c", "effective_bits=1"], "closest that can be reached"),
        (["-c", "effective_bits"], "NAME=VALUE"),
        (["-c", "effective_bits=many"], "positive number"),
        (["-c", "effective_bits=4", "-c", "effective_bits=5"], "twice"),
        (["-c", "flops=60%"], "Known: effective_bits"),
        (["-c", "effective_bits=4", "--option", "sensitivty=kl"], "'sensitivity'"),
        (["-c", "effective_bits=4", "--option", "checkpoint=x"], "a run brings its own"),
        (["-c", "effective_bits=4", "--config", "candidates=[w9a16]"], "no scheme"),
        ([], "constraint"),
    ],
    ids=str,
)
def test_mistakes_end_with_a_paragraph(
    arguments: list[str],
    text: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["--calibration", write_text(tmp_path / "t.txt"), "--windows", 2, "--length", 16]
    code, _, err = search(model, *arguments, *data, capsys=capsys)

    assert code == 2
    assert text in " ".join(err.split())


def test_mode_without_a_search_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("search", model, "-m", "mse", "-c", "params=50%", capsys=capsys)

    assert code == 2
    assert "has no search" in err


def test_recipe_with_a_search_is_optimized(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"source": str(write_text(tmp_path / "t.txt")), "windows": 4, "length": 16}
    step = {
        "mode": "auto_quantize",
        "config": {"candidates": ["w4a16", "w8a16"]},
        "search": {"constraints": {"effective_bits": 6}},
    }
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump({"steps": [step, "mse"], "calibration": data, "evaluation": data})
    )
    code, shown, err = run("optimize", model, "-r", recipe, capsys=capsys)

    assert code == 0, err
    assert "effective bits" in shown


def test_page_names_every_option() -> None:
    page = DOCS.read_text(encoding="utf-8")
    missing = [p.opts[-1] for p in command.params if p.opts and p.opts[-1] not in page]

    assert [name for name in missing if name.startswith("--") and name != "-c"] == []
