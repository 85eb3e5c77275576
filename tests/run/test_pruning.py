# SPDX-License-Identifier: Apache-2.0
"""A run that prunes a language model writes a folder that any program can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import modewright
from modewright.run.optimize import optimize
from support.language_models import save_tiny_llama

TOKENS = torch.arange(12)[None]


def recipe(text: Path, *steps: Any) -> dict[str, Any]:
    return {
        "name": "prune",
        "steps": list(steps),
        "calibration": {"source": "self", "windows": 4, "length": 16},
        "evaluation": {"source": str(text), "windows": 2, "length": 16},
    }


def search(mode: str, **config: Any) -> dict[str, Any]:
    part = {"constraints": {"params": "80%"}, "options": {"batches": 2}}
    return {"mode": mode, "config": config, "search": part}


def test_a_pruned_model_loads_with_transformers_and_can_be_optimized_further(
    text: Path, tmp_path: Path
) -> None:
    import transformers

    llama = save_tiny_llama(tmp_path / "model", layers=4)
    steps = [search("minitron", divisor=4), "refit", "export_prune"]
    first = optimize(llama, recipe(text, *steps), output=tmp_path / "pruned")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    second = optimize(
        tmp_path / "pruned",
        recipe(text, {"mode": "quantize", "config": {"scheme": "w8a16"}}),
        output=tmp_path / "quantized",
    )

    assert first.restored_in == second.restored_in == "a fresh process"
    assert first.skipped == ()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, first.model(TOKENS).logits)
    modes = [record["name"] for record in modewright.mode_state(second.model)["modes"]]
    assert modes == ["minitron", "refit", "export_prune", "quantize"]
    assert first.size_after < 0.85 * first.size_before
