# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from modewright.modes.registry import ModeRegistry
from support.example_modes import example_registry


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def registry() -> ModeRegistry:
    """The example modes."""
    return example_registry()
