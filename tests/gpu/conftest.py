# SPDX-License-Identifier: Apache-2.0
"""Tests that need a GPU: they are skipped where there is none."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
