# SPDX-License-Identifier: Apache-2.0
"""Logs of parts become one, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modewright.builtin_modes import default_registry
from modewright.errors import ApplyModeError
from modewright.modes.merging import merge_states
from modewright.modes.state import ModeRecord, ModeState


def log(metadata: dict[str, Any], config: dict[str, Any] | None = None) -> ModeState:
    descriptor = default_registry["max_calibrate"]
    return ModeState((ModeRecord(descriptor=descriptor, config=config or {}, metadata=metadata),))


def merged(*metadata: dict[str, Any]) -> dict[str, Any]:
    return merge_states([log(each) for each in metadata]).records[0].metadata


def test_names_are_united_and_lists_follow_one_another() -> None:
    found = merged(
        {"layers": {"a": 1}, "skipped": [{"module": "a"}], "kind": "x"},
        {"layers": {"b": {"c": 2}}, "skipped": [], "kind": "x", "only": 1},
    )

    assert found == {
        "layers": {"a": 1, "b": {"c": 2}},
        "skipped": [{"module": "a"}],
        "kind": "x",
        "only": 1,
    }


def test_parts_without_modes_add_nothing() -> None:
    assert merge_states([ModeState(), log({"layers": {}}), ModeState()]) == log({"layers": {}})
    assert merge_states([ModeState()]) == ModeState()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"layers": {"a": 1}}, {"layers": {"a": 2}}),
        ({"kind": "x"}, {"kind": "y"}),
        ({"kind": 1}, {"kind": True}),
        ({"kind": []}, {"kind": {}}),
        ({"seen": torch.ones(1)}, {"seen": torch.ones(1)}),
    ],
)
def test_what_differs_is_refused(one: dict[str, Any], other: dict[str, Any]) -> None:
    with pytest.raises(ApplyModeError, match="max_calibrate"):
        merged(one, other)


def test_other_configs_and_other_modes_are_refused() -> None:
    with pytest.raises(ApplyModeError, match="different configs"):
        merge_states([log({}), log({}, {"require_data": False})])
    twice = ModeState((*log({}).records, *log({}).records))
    with pytest.raises(ApplyModeError, match="different modes"):
        merge_states([log({}), twice])
