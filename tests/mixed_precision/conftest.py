# SPDX-License-Identifier: Apache-2.0
"""A small language model, and data for it."""

from __future__ import annotations

import pytest
import torch

from support.small_lm import SmallLm, small_lm


@pytest.fixture
def model() -> SmallLm:
    return small_lm()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return list(torch.randint(24, (6, 2, 40), generator=generator))
