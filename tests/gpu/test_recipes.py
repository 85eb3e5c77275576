# SPDX-License-Identifier: Apache-2.0
"""Every recipe of the library does on a GPU what it does on the CPU."""

from __future__ import annotations

import pytest
import torch

import modewright
from modewright.recipes.loader import recipe_names
from support.library_recipes import llama, quick, windows


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_the_library_runs_on_a_gpu(name: str) -> None:
    losses = {}
    for device in ("cuda", "cpu"):
        ids, model = windows().to(device), llama().to(device)

        result = modewright.optimize(
            model, quick(name), calibration=list(ids[:12]), evaluation=ids[12:, 0]
        )

        assert result.restored_identical
        assert result.optimized is not None
        losses[device] = result.optimized.loss
        logits = result.model(ids[-1]).logits
        assert logits.device.type == device
        assert torch.isfinite(logits).all()
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=0.03)  # near ties fall otherwise
