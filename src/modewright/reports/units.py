# SPDX-License-Identifier: Apache-2.0
"""How sizes, times and values are written."""

from __future__ import annotations

import math


def size(count: int | None) -> str:
    """Return bytes in binary units: ``513.1 MiB``."""
    if count is None:
        return ""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return ""


def seconds(value: float) -> str:
    """Return seconds: ``0.14 s``, ``13.9 s``, ``4 min 05 s``."""
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s"


def number(value: float | None, digits: int = 4) -> str:
    """Return a measured value with so many significant digits; empty if there is none."""
    if value is None:
        return ""
    return f"{value:#.{digits}g}" if math.isfinite(value) else str(value)
