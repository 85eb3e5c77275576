# SPDX-License-Identifier: Apache-2.0
"""The main job on a real language model, from the command line, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of decoded models, shared by the tests of this file."""
    return tmp_path_factory.mktemp("cache")


def command(cache: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "modewright", *map(str, arguments)],
        env={**os.environ, "MODEWRIGHT_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def optimized(cache: Path, *arguments: object) -> dict[str, Any]:
    process = command(cache, "optimize", "demo:smollm2", "--json", *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    data: dict[str, Any] = json.loads(out)
    return data


def test_w8a8_costs_almost_nothing_and_restores_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    result = optimized(cache, "--recipe", "w8a8", "--output", tmp_path / "out")

    assert result["restored_identical"] is True
    assert result["restored_in"] == "a fresh process"
    assert 10 < result["baseline"]["perplexity"] < 30
    assert abs(result["loss_increase"]) < 0.05
    assert 0 < result["kl_divergence"] < 0.06
    assert result["packed_size"] < 0.45 * result["size_before"]


def test_an_interrupted_run_goes_on_and_gives_what_a_whole_one_gives(
    cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = command(cache, "optimize", "demo:smollm2", "-r", "w4a16", "-o", output, "--json")
    progress = tmp_path / "out.partial" / "progress.json"
    deadline = time.monotonic() + 240
    while not (progress.is_file() and "baseline" in progress.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not output.exists()

    result = optimized(cache, "-r", "w4a16", "-o", output)

    assert "baseline" not in [step["name"] for step in result["steps"]]
    assert result["restored_identical"] is True
    # int4 in groups of 64 by round-to-nearest costs something, but leaves a language model
    assert 0.1 < result["loss_increase"] < 0.6
    assert not progress.parent.exists()
