# SPDX-License-Identifier: Apache-2.0
"""A run on a GPU, from files to files: proven in a fresh process there, and timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from modewright.run.bench import bench
from modewright.run.device import device_of
from modewright.run.optimize import optimize
from support.language_models import save_tiny_llama, tiny_recipe, write_text

pytest.importorskip("transformers")


@pytest.mark.parametrize("last", ["export_quantize", "compress"])
def test_a_model_from_files_is_optimized_and_timed_on_a_gpu(last: str, tmp_path: Path) -> None:
    folder, text = save_tiny_llama(tmp_path / "llama"), write_text(tmp_path / "text.txt")
    steps = [
        {"mode": "quantize", "config": {"scheme": "w8a8", "ignore": ["lm_head"]}},
        {"mode": "mse"},
        {"mode": last},
    ]

    result = optimize(
        folder, tiny_recipe(text, steps=steps), output=tmp_path / "output", device="cuda"
    )
    timed = bench(tmp_path / "output", device="cuda", repeats=1, prompt=4, length=8, tokens=2)

    assert result.restored_in == "a fresh process"
    assert device_of(result.model).type == "cuda"
    assert {timing.name for timing in timed.models[0].timings} == {"decode", "prefill"}
