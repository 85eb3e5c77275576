# SPDX-License-Identifier: Apache-2.0
"""The tables of the terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from modewright.evaluation.language import LanguageQuality
from modewright.reports.progress import ProgressDisplay
from modewright.reports.terminal import SHOWN_SKIPS, result_table
from modewright.run.result import Check, Result, Skipped, StepResult


@pytest.fixture
def result() -> Result:
    return Result(
        model=nn.Identity(),
        recipe="mine",
        source="[model]",
        output=Path("out"),
        steps=(StepResult(name="quantize", seconds=1.5, peak_memory=2**30),),
        size_before=1000,
        size_after=2000,
        packed_size=500,
        baseline=LanguageQuality(loss=2.0, tokens=10),
        optimized=LanguageQuality(loss=2.25, tokens=10),
        kl_divergence=0.125,
        restored_identical=True,
        restored_in="this process",
        skipped=(),
        checks=(),
        calibration=None,
    )


def text_of(result: Result) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(result_table(result))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_everything_that_was_measured_is_shown(result: Result) -> None:
    shown = text_of(result)

    for words in ("[model]", "+0.2500", "0.1250", "7.389", "9.488", "500 B", "1.50 s", "1.0 GiB"):
        assert words in shown


def test_only_what_is_simulated_is_said_to_be(result: Result) -> None:
    packed = text_of(replace(result, size_after=500))

    assert "Low precision is simulated" in text_of(result)
    assert "simulated" not in packed
    assert "if packed" not in packed


def test_without_data_it_says_that_nothing_was_measured(result: Result) -> None:
    shown = text_of(replace(result, baseline=None, optimized=None, kl_divergence=None))

    assert "not measured" in shown
    assert "perplexity" not in shown


def test_many_skips_are_cut_and_counted(result: Result) -> None:
    skipped = tuple(
        Skipped(mode="quantize", module=f"layer{i}", reason="[odd]") for i in range(SHOWN_SKIPS + 3)
    )
    shown = text_of(replace(result, skipped=skipped))

    assert "layer0" in shown
    assert "[odd]" in shown
    assert f"layer{SHOWN_SKIPS}" not in shown
    assert "3 more" in shown


def test_fallbacks_resumed_steps_and_checks_are_shown(result: Result) -> None:
    step = result.steps[0].in_place_of("gptq", "no data")
    checks = (Check(name="loss increase", limit=0.1, value=0.25),)
    shown = text_of(replace(result, steps=(replace(step, resumed=True),), checks=checks))

    for words in ("fallback for gptq", "no data", "earlier run", "MISSED"):
        assert words in shown


def test_progress_without_a_terminal_is_one_line_for_each_part() -> None:
    console = Console(file=io.StringIO(), width=80)

    with ProgressDisplay(console) as display:
        display("baseline", 0, None)
        display("baseline", 1, 2)
        display("save", 0, None)

    file = console.file
    assert isinstance(file, io.StringIO)
    assert file.getvalue() == "baseline ...\nsave ...\n"


def test_progress_in_a_terminal_shows_how_much_is_done() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)

    with ProgressDisplay(console) as display:
        display("baseline", 1, 2)
        display("baseline", 2, 2)

    file = console.file
    assert isinstance(file, io.StringIO)
    assert "2/2" in file.getvalue()
