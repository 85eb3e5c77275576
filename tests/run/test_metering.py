# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of a part of a run."""

from __future__ import annotations

import mmap
import threading

import pytest

from modewright.run.metering import Meter


def test_a_peak_in_between_is_seen() -> None:
    seen = threading.Event()

    with Meter(interval=0.001) as meter:
        before = meter.peak_memory
        with mmap.mmap(-1, 64 << 20) as block:  # pages of its own, never ones that were freed
            block.write(b"x" * len(block))
            seen.wait(0.05)

    assert meter.peak_memory >= before + (32 << 20)
    assert meter.seconds > 0


def test_it_stops_after_an_error() -> None:
    running = threading.active_count()

    with pytest.raises(ValueError, match="broken"), Meter() as meter:
        raise ValueError("broken")

    assert threading.active_count() == running
    assert meter.seconds > 0
