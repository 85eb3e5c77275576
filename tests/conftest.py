# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the path to ``support`` and reproducible property tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("support")

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")
