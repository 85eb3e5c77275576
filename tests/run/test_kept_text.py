# SPDX-License-Identifier: Apache-2.0
"""Text that the model wrote outlives an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modewright.builtin_modes import default_registry
from modewright.recipes.loader import load_recipe
from modewright.recipes.schema import TextData
from modewright.run import data as run_data
from modewright.run import stages
from modewright.run.kept_text import FILE, KeptText, is_written, partial_folder
from modewright.run.optimize import optimize
from modewright.run.subject import open_subject
from support.language_models import save_tiny_llama, tiny_recipe, write_text

TEXT = TextData(windows=2, length=8, augmented=3)
WINDOWS = torch.arange(40).reshape(5, 8)


def test_what_was_kept_is_read_by_the_same_run_alone(tmp_path: Path) -> None:
    output = tmp_path / "output"
    KeptText(output, TEXT, ["model"]).keep(WINDOWS)

    found = KeptText(output, TEXT, ["model"]).read()
    assert found is not None
    assert torch.equal(found, WINDOWS)
    assert KeptText(output, TEXT, ["another"]).read() is None
    assert KeptText(output, TEXT.model_copy(update={"seed": 1}), ["model"]).read() is None
    assert KeptText(tmp_path / "elsewhere", TEXT, ["model"]).read() is None


def test_a_damaged_file_is_as_good_as_none(tmp_path: Path) -> None:
    kept = KeptText(tmp_path / "output", TEXT, ["model"])
    kept.keep(WINDOWS)
    (partial_folder(tmp_path / "output") / FILE).write_bytes(b"damaged")
    assert kept.read() is None


def test_a_run_without_output_keeps_nothing(tmp_path: Path) -> None:
    kept = KeptText(None, TEXT, ["model"])
    kept.keep(WINDOWS)
    assert kept.read() is None
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_model_writes_is_worth_keeping() -> None:
    assert is_written(TEXT)
    assert is_written(TextData(source="self"))
    assert not is_written(TextData())


def test_an_interrupted_run_does_not_write_its_text_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, text = save_tiny_llama(tmp_path / "llama"), write_text(tmp_path / "text.txt")
    data = {"source": str(text), "windows": 4, "length": 16}
    recipe = tiny_recipe(text, calibration={**data, "augmented": 2})
    output = tmp_path / "output"
    written: list[int] = []
    more_windows = run_data.more_windows

    def counting(*args: Any, **keywords: Any) -> list[torch.Tensor]:
        written.append(keywords["count"])
        return more_windows(*args, **keywords)

    def interrupted(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_data, "more_windows", counting)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "apply_mode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimize(llama, recipe, output=output)
    assert written == [2]

    other = {**recipe, "steps": [*recipe["steps"], {"mode": "export_quantize"}]}
    with monkeypatch.context() as patch:
        patch.setattr(stages, "apply_mode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimize(llama, other, output=output)  # another run: its progress begins anew
    assert written == [2]

    result = optimize(llama, recipe, output=output)
    assert written == [2]
    assert result.calibration == optimize(llama, recipe).calibration
    assert not partial_folder(output).exists()


def test_other_text_under_the_same_name_is_not_what_was_kept(tmp_path: Path) -> None:
    llama, text = save_tiny_llama(tmp_path / "llama"), write_text(tmp_path / "text.txt")
    data = {"source": str(text), "windows": 4, "length": 16, "augmented": 2}
    recipe = load_recipe(tiny_recipe(text, calibration=data))
    subject = open_subject(llama, registry=default_registry)
    output = tmp_path / "output"

    def load() -> str | None:
        found = run_data.load_calibration(recipe, subject, output=output)
        return found and found.fingerprint

    first = load()
    assert load() == first
    text.write_text(text.read_text().replace("w3", "w4"))
    assert load() != first
