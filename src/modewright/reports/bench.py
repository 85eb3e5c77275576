# SPDX-License-Identifier: Apache-2.0
"""The table of ``modewright bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from modewright.reports.units import number, seconds, size

if TYPE_CHECKING:
    from modewright.run.bench import BenchResult, Measured, Timing


def bench_table(result: BenchResult) -> Table:
    """Return one column a model: speed with its spread, memory, size on disk, time to load."""
    table = Table(caption=_caption(result))
    table.add_column("", no_wrap=True)
    for model in result.models:
        table.add_column(escape(model.name), justify="right")
    for place, timing in enumerate(result.models[0].timings):
        cells = [_speed(result, model, model.timings[place]) for model in result.models]
        table.add_row(f"{timing.name}, {timing.unit} per second", *cells)
        spreads = [_spread(model.timings[place]) for model in result.models]
        table.add_row("  slowest to fastest", *spreads, style="dim")
    table.add_section()
    table.add_row("weights in memory", *(size(model.weight_bytes) for model in result.models))
    table.add_row("weights on disk", *(size(model.disk_bytes) for model in result.models))
    loads = [model.load_seconds for model in result.models]
    table.add_row("time to load", *("" if t is None else seconds(t) for t in loads))
    return table


def _speed(result: BenchResult, model: Measured, timing: Timing) -> str:
    text = number(timing.per_second, 3)
    if model is result.models[-1]:
        return text
    return f"{text} ({result.speedup(model, timing.name):.2f}x)"


def _spread(timing: Timing) -> str:
    return f"{number(1 / timing.slowest, 3)} to {number(1 / timing.fastest, 3)}"


def _caption(result: BenchResult) -> str:
    timings = result.models[0].timings
    threads = f"{result.threads} thread{'s' * (result.threads > 1)}"
    what = f"medians of {timings[0].repeats} repetitions in turn, {threads}"
    if any(timing.name == "decode" for timing in timings):
        what += f"; decoding after {result.prompt} tokens, prefill of {result.length}"
    return what
