# SPDX-License-Identifier: Apache-2.0
"""The tables that people read in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from modewright.reports.units import number, seconds, size

if TYPE_CHECKING:
    from modewright.modes.checkpoint import Inspection
    from modewright.run.result import Result

SHOWN_SKIPS = 8


def result_table(result: Result) -> Table:
    """Return the one table of a run: sizes, quality, time and memory, what was skipped."""
    table = Table(title=f"{escape(result.source)} · recipe {escape(result.recipe)}")
    table.add_column("", no_wrap=True)
    table.add_column("original", justify="right", no_wrap=True)
    table.add_column("optimized", justify="right")
    _add_quality(table, result)
    table.add_section()
    table.add_row("[bold]step", "[bold]seconds", "[bold]peak memory")
    for step in result.steps:
        note = " (earlier run)" if step.resumed else ""
        if step.fallback_for is not None:
            note += f" (fallback for {step.fallback_for})"
        table.add_row(escape(step.name + note), seconds(step.seconds), size(step.peak_memory))
    total = sum(step.seconds for step in result.steps)
    peak = max(step.peak_memory for step in result.steps)
    table.add_row("all", seconds(total), size(peak), style="bold")
    table.add_section()
    for step in result.steps:
        if step.fallback_reason is not None:
            table.add_row(f"failed: {step.fallback_for}", "", escape(step.fallback_reason))
    for skip in result.skipped[:SHOWN_SKIPS]:
        table.add_row(f"skipped: {escape(skip.module)}", skip.mode, escape(skip.reason))
    if len(result.skipped) > SHOWN_SKIPS:
        more = len(result.skipped) - SHOWN_SKIPS
        table.add_row(f"... and {more} more skipped", "", "all of them with --json")
    if not result.skipped:
        table.add_row("skipped", "", "nothing")
    for check in result.checks:
        verdict = "satisfied" if check.passed else "[red]MISSED[/red]"
        text = f"{number(check.value) or 'not measured'} of at most {check.limit:g}: {verdict}"
        table.add_row(f"check: {check.name}", "", text)
    return table


def _add_quality(table: Table, result: Result) -> None:
    before, after = result.baseline, result.optimized
    table.add_row("weights as saved", size(result.size_before), size(result.size_after))
    if result.packed_size is not None and result.packed_size < result.size_after:
        table.add_row("weights if packed", "", size(result.packed_size))
        table.caption = (
            "Low precision is simulated: weights are saved in their original dtype, with scales "
            "beside them or folded in. Packed is what they would take in that many bits."
        )
    if before is not None and after is not None:
        table.add_row("perplexity", number(before.perplexity), number(after.perplexity))
        increase = f"{number(after.loss)} ({result.loss_increase:+.4f})"
        table.add_row("loss, nats per token", number(before.loss), increase)
        table.add_row("KL divergence, nats", "", number(result.kl_divergence))
    elif result.similarity is not None:
        table.add_row("cosine similarity of outputs", "", number(result.similarity))
    else:
        table.add_row("quality", "", "not measured: no evaluation data, or streamed")
    if result.restored_identical:
        table.add_row("restored", "", f"identical, in {result.restored_in}")


def inspection_table(inspection: Inspection) -> Table:
    """Return what a checkpoint holds."""
    table = Table(title=escape(inspection.source), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("written by", f"modewright {escape(inspection.modewright_version)}")
    tied = f" (and {len(inspection.tied)} tied to one of these)" if inspection.tied else ""
    table.add_row("tensors", f"{inspection.tensors}{tied}")
    table.add_row("bytes", size(inspection.bytes))
    for dtype, count in sorted(inspection.bytes_by_dtype.items()):
        table.add_row(f"  {escape(dtype)}", size(count))
    table.add_section()
    if not inspection.modes:
        table.add_row("modes", "none was applied")
    for index, mode in enumerate(inspection.modes):
        changed = ", ".join(f"{k}={v!r}" for k, v in mode.get("config", {}).items())
        table.add_row(f"{index + 1}. {escape(str(mode.get('name')))}", escape(changed))
        table.add_row("", escape(_metadata_summary(mode.get("metadata", {}))), style="dim")
    return table


def _metadata_summary(metadata: dict[str, Any]) -> str:
    parts = []
    for key, value in metadata.items():
        held = f"{len(value)} entries" if isinstance(value, (dict, list)) else repr(value)
        parts.append(f"{key}: {held}")
    return "; ".join(parts) or "no metadata"
