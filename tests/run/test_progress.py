# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind while it works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modewright.errors import ConfigError
from modewright.evaluation.language import LanguageQuality
from modewright.run.progress import Progress, require_replaceable
from modewright.run.quality import Baseline


def test_a_baseline_is_kept_exactly(tmp_path: Path) -> None:
    quality = LanguageQuality(loss=1.2345678901234567, tokens=10)
    reference = torch.randn(1, 3, 5)
    Progress(tmp_path / "out", "same").keep_baseline(Baseline(quality, reference))

    known = Progress(tmp_path / "out", "same").baseline()

    assert known is not None
    assert known.language == quality
    assert torch.equal(known.reference, reference)


@pytest.mark.parametrize("damage", ["progress.json", "reference.safetensors"])
def test_damaged_progress_is_started_anew(tmp_path: Path, damage: str) -> None:
    quality = LanguageQuality(loss=1.0, tokens=10)
    Progress(tmp_path / "out", "same").keep_baseline(Baseline(quality, torch.randn(1, 3, 5)))
    (tmp_path / "out.partial" / damage).write_bytes(b"{")

    assert Progress(tmp_path / "out", "same").baseline() is None


def test_a_run_without_output_keeps_nothing(tmp_path: Path) -> None:
    progress = Progress(None, "same")
    progress.keep_baseline(Baseline(LanguageQuality(loss=1.0, tokens=10), torch.randn(1, 3, 5)))
    progress.publish()

    assert progress.baseline() is None
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_replaced_and_a_file_may_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    require_replaceable(tmp_path / "empty")
    require_replaceable(tmp_path / "missing")
    (tmp_path / "file").write_text("mine")

    with pytest.raises(ConfigError, match="was not written by modewright"):
        require_replaceable(tmp_path / "file")


def test_publishing_replaces_an_earlier_output_at_once(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for content in ("old", "new"):
        progress = Progress(output, content)
        with progress.result_folder() as folder:
            folder.mkdir()
            (folder / "mode_state.json").write_text(content)
            progress.publish()

    assert (output / "mode_state.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_lost_between_two_renames_is_put_back(tmp_path: Path) -> None:
    output = tmp_path / "out"
    Progress(output, "one")
    replaced = tmp_path / "out.partial" / "replaced"
    replaced.mkdir()
    (replaced / "mode_state.json").write_text("old")

    Progress(output, "two")

    assert (output / "mode_state.json").read_text() == "old"
