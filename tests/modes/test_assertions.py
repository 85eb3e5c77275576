# SPDX-License-Identifier: Apache-2.0
"""The tests are worth something under ``python -O`` too."""

import pytest

from support.photograph import Photograph


def test_assertions_are_executed_whatever_the_interpreter_flags() -> None:
    with pytest.raises(AssertionError):
        assert Photograph is None
