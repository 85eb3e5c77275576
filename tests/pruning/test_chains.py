# SPDX-License-Identifier: Apache-2.0
"""Pruned networks go through other modes, are saved and restored; wrong orders are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import CheckpointError, IncompatibleModeError
from support.prunable_networks import build
from support.prunable_transformers import build_transformer

AFTER: dict[str, list[Any]] = {
    "nothing": [],
    "quantize": [("quantize", {"scheme": "w8a8"}), "max_calibrate"],
    "fold": [("quantize", {"scheme": "w4a16"}), ("gptq", {"min_tokens": 1}), "export_quantize"],
    "pack": [("quantize", {"scheme": "w4a16"}), "mse", "compress"],
    "prune again": ["fastnas", "export_prune"],
}


def searched(mode: str) -> tuple[nn.Module, torch.Tensor]:
    model, example = build("mobile")
    config = {"steps": 2, "population": 2, "generations": 1} if mode == "autonas" else {}
    result = modewright.search(
        model,
        (mode, {"divisor": 4}),
        {"flops": "60%"},
        dummy_input=example,
        calibration=[example],
        config=config,
    )
    return result.model, example


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("mode", ["fastnas", "gradnas", "autonas"])
def test_a_pruned_network_goes_on_and_is_restored(mode: str, after: str, tmp_path: Path) -> None:
    model, example = searched(mode)
    model = modewright.apply_mode(model, "export_prune")
    if AFTER[after]:
        model = modewright.apply_mode(model, AFTER[after], mode_kwargs=_data(after, example))
    modewright.save(model, tmp_path / "model.safetensors")
    restored = modewright.restore(build("mobile")[0], tmp_path / "model.safetensors")
    assert torch.equal(restored(example), model(example))


def _data(after: str, example: torch.Tensor) -> Any:
    quantizing = {"calibration": [example]}
    return [
        {} if mode in ("fastnas", "export_prune", "export_quantize", "compress") else quantizing
        for mode in (m if isinstance(m, str) else m[0] for m in AFTER[after])
    ]


@pytest.mark.parametrize("mode", ["fastnas", "gradnas", "autonas"])
def test_what_a_search_chose_is_saved_with_the_open_space(mode: str, tmp_path: Path) -> None:
    model, example = searched(mode)
    modewright.save(model, tmp_path / "model.safetensors")
    restored = modewright.restore(build("mobile")[0], tmp_path / "model.safetensors")
    assert torch.equal(restored(example), model(example))
    small = modewright.apply_mode(restored, "export_prune")
    assert torch.equal(small(example), model(example))


@pytest.mark.parametrize(
    "before",
    [
        [("quantize", {"scheme": "w8a8"})],
        [("quantize", {"scheme": "w4a16"}), "compress"],
        ["gradnas"],
    ],
)
def test_orders_that_make_no_sense_are_refused(before: list[Any]) -> None:
    model, _ = build("mobile")
    model = modewright.apply_mode(model, before)
    with pytest.raises(IncompatibleModeError):
        modewright.apply_mode(model, "fastnas")


def test_nothing_is_exported_that_was_not_opened() -> None:
    with pytest.raises(IncompatibleModeError, match="none is open"):
        modewright.apply_mode(build("mobile")[0], "export_prune")


def test_a_record_does_not_fit_another_network(tmp_path: Path) -> None:
    model, _ = searched("fastnas")
    modewright.save(modewright.apply_mode(model, "export_prune"), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError):
        modewright.restore(build("residual")[0], tmp_path / "m.safetensors")


def test_the_space_may_be_left_whole() -> None:
    model, example = build_transformer("llama")
    before = model(**example).logits
    model = modewright.apply_mode(model, ["gradnas", "export_prune"])
    assert torch.equal(model(**example).logits, before)
