# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the run's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.language_models import save_tiny_llama, write_text


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The folder of a tiny language model."""
    return save_tiny_llama(tmp_path / "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file that the tiny model can read."""
    return write_text(tmp_path / "text.txt")
