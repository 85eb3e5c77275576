# SPDX-License-Identifier: Apache-2.0
"""One tree of errors, each with the class under which other code catches the same mistake."""

from __future__ import annotations

import pickle

import pytest

from modewright import errors
from modewright.errors import ApplyModeError, ModewrightError, UnknownModeError, did_you_mean

SECOND_BASES = {
    "UnknownModeError": KeyError,
    "ConfigError": ValueError,
    "MatchError": ValueError,
    "IncompatibleModeError": AssertionError,
    "ApplyModeError": RuntimeError,
    "CheckpointError": ValueError,
    "DataError": ValueError,
    "ExportError": RuntimeError,
    "SearchError": RuntimeError,
    "KernelError": RuntimeError,
}


def error_classes() -> list[str]:
    return [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, ModewrightError)
    ]


def test_tree_is_complete_and_drawn_in_the_docstring() -> None:
    assert set(error_classes()) == {"ModewrightError", *SECOND_BASES}
    for name, base in SECOND_BASES.items():
        line = next(line for line in errors.__doc__.splitlines() if f"── {name} " in line)
        assert f"({base.__name__})" in line


@pytest.mark.parametrize(("name", "base"), SECOND_BASES.items(), ids=SECOND_BASES)
def test_error_is_caught_under_both_bases_and_shows_its_message(
    name: str, base: type[Exception]
) -> None:
    kind = getattr(errors, name)
    for caught in (ModewrightError, base):
        with pytest.raises(caught) as info:
            raise kind("what was expected")
        assert str(info.value) == "what was expected"
    assert kind.__doc__


def test_message_of_an_unknown_mode_is_not_quoted_like_a_key() -> None:
    assert str(UnknownModeError("There is no mode 'x'.")) == "There is no mode 'x'."
    assert str(UnknownModeError()) == ""


def test_apply_mode_error_knows_mode_place_and_cause() -> None:
    cause = ZeroDivisionError("x")
    with pytest.raises(ApplyModeError) as info:
        raise ApplyModeError("failed", mode="gain", index=2) from cause

    assert (info.value.mode, info.value.index, info.value.cause) == ("gain", 2, cause)
    assert ApplyModeError("failed").mode is None


@pytest.mark.parametrize("name", [*SECOND_BASES, "ModewrightError"])
def test_error_survives_the_way_to_another_process(name: str) -> None:
    copy = pickle.loads(pickle.dumps(getattr(errors, name)("text")))

    assert str(copy) == "text"


def test_nearest_names_are_suggested_best_first() -> None:
    assert did_you_mean("widhts", ["width", "widths", "x"]) == " Did you mean 'widths', 'width'?"
    assert did_you_mean("zzz", ["prune", "quantize"]) == ""
    assert did_you_mean("x", []) == ""
