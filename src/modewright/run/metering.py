# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of a part of a run."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil


class Meter:
    """A context that measures wall-clock seconds and the peak of resident memory.

    Memory is sampled by a thread, so a peak shorter than the interval may be missed.

    Attributes:
        seconds: Wall-clock seconds spent inside.
        peak_memory: Largest resident set of the process seen, in bytes.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.seconds = 0.0
        self.peak_memory = 0
        self._interval = interval
        self._done = threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        """Start."""
        self._started = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, also after an error."""
        self._done.set()
        self._thread.join()
        self._sample()
        self.seconds = time.perf_counter() - self._started

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        self.peak_memory = max(self.peak_memory, self._process.memory_info().rss)
