# SPDX-License-Identifier: Apache-2.0
"""``plan`` says beforehand what ``apply_mode`` would do or refuse."""

from __future__ import annotations

from typing import Any

import pytest

from modewright.errors import ConfigError, IncompatibleModeError, ModewrightError, UnknownModeError
from modewright.modes.apply import apply_mode
from modewright.modes.planning import plan
from modewright.modes.registry import ModeRegistry
from support.example_modes import make_mode
from support.models import MLP
from support.photograph import Photograph


def test_possible_sequence_is_planned_step_by_step(registry: ModeRegistry) -> None:
    result = plan(MLP.make(), ["widths", ("gain", {"factor": 3})], registry=registry)

    assert result.ok
    assert result.problem is None
    assert [step.mode for step in result.steps] == ["widths", "gain"]
    assert result.steps[1].config == {"factor": 3.0}
    assert result.traits == ("search_space",)
    assert result.open_modes == ("widths",)
    assert "then the model is: search_space" in str(result)
    result.require_ok()


def test_planning_changes_nothing(registry: ModeRegistry) -> None:
    model = MLP.make()
    before = Photograph(model)
    plan(model, ["widths", "export_widths"], registry=registry)

    assert before.differences(model) == []


PROBLEMS: dict[str, tuple[Any, type[ModewrightError]]] = {
    "unknown": (["widths", "nope", "gain"], UnknownModeError),
    "config": (["widths", ("gain", {"factor": -1}), "gain"], ConfigError),
    "order": (["widths", "widths", "gain"], IncompatibleModeError),
}


@pytest.mark.parametrize(("modes", "kind"), PROBLEMS.values(), ids=PROBLEMS)
def test_plan_ends_at_the_first_problem_and_lists_what_was_not_reached(
    modes: Any, kind: type[ModewrightError], registry: ModeRegistry
) -> None:
    result = plan(MLP.make(), modes, registry=registry)

    assert not result.ok
    assert len(result.steps) == 2
    assert result.not_reached == ("gain",)
    assert "NOT POSSIBLE" in str(result)
    with pytest.raises(kind):
        result.require_ok()
    with pytest.raises(kind):
        apply_mode(MLP.make(), modes, registry=registry)


def test_plan_goes_on_from_the_modes_that_were_applied(registry: ModeRegistry) -> None:
    model = apply_mode(MLP.make(), "widths", registry=registry)

    result = plan(model, "export_widths", registry=registry)
    assert result.ok
    assert result.applied == ("widths",)
    assert "already applied: widths" in str(result)
    assert not plan(MLP.make(), "export_widths", registry=registry).ok


def test_sequence_can_be_planned_without_a_model(registry: ModeRegistry) -> None:
    assert plan(None, ["widths", "export_widths"], registry=registry).ok
    assert plan(None, [], registry=registry).ok


def test_effects_come_from_the_preview_of_a_mode() -> None:
    mode = make_mode("m", preview=lambda self, model, config: [f"sees {type(model).__name__}"])

    result = plan(MLP.make(), mode, registry=ModeRegistry())
    assert result.steps[0].effects == ("sees Mlp",)
    assert "     sees Mlp" in str(result)


def test_rules_of_an_unregistered_descriptor_are_checked() -> None:
    result = plan(None, make_mode("x", next_modes={"nowhere"}), registry=ModeRegistry())

    assert not result.ok
    assert isinstance(result.steps[0].error, UnknownModeError)
