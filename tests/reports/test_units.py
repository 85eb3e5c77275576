# SPDX-License-Identifier: Apache-2.0
"""How sizes, times and values are written."""

from __future__ import annotations

import math

import pytest

from modewright.reports.units import number, seconds, size


@pytest.mark.parametrize(
    ("count", "written"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (538060032, "513.1 MiB"),
        (3 * 2**40, "3072.0 GiB"),
        (None, ""),
    ],
)
def test_sizes(count: int | None, written: str) -> None:
    assert size(count) == written


@pytest.mark.parametrize(
    ("value", "written"), [(0.136, "0.14 s"), (13.89, "13.9 s"), (244.6, "4 min 05 s")]
)
def test_seconds(value: float, written: str) -> None:
    assert seconds(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(17.1742, "17.17"), (0.030363, "0.03036"), (math.inf, "inf"), (math.nan, "nan"), (None, "")],
)
def test_numbers(value: float | None, written: str) -> None:
    assert number(value) == written
