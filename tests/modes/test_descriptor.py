# SPDX-License-Identifier: Apache-2.0
"""What a descriptor declares, in both styles of writing it."""

from __future__ import annotations

import pytest

from modewright.errors import IncompatibleModeError, SearchError, UnknownModeError
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.registry import ModeRegistry
from support.example_modes import GainMode, NoConfig, WidthSearcher, WidthsMode, make_mode

DEFAULTS = {
    "technique": "",
    "next_modes": None,
    "next_prohibited_modes": None,
    "export_mode": None,
    "is_export_mode": False,
    "requires": frozenset(),
    "provides": frozenset(),
    "removes": frozenset(),
    "forbids": frozenset(),
    "require_model_like": False,
    "save_mode_in_state": True,
    "writes_in_place": True,
    "uses_calibration": False,
}


@pytest.mark.parametrize(("member", "value"), DEFAULTS.items(), ids=DEFAULTS)
def test_member_has_the_documented_default(member: str, value: object) -> None:
    assert getattr(make_mode("plain"), member) == value


@pytest.mark.parametrize("missing", ["name", "config_class", "convert", "restore"])
def test_descriptor_without_an_abstract_member_cannot_be_made(missing: str) -> None:
    members = {
        "name": "incomplete",
        "config_class": NoConfig,
        "convert": lambda self, model, config: (model, {}),
        "restore": lambda self, model, config, metadata: model,
    }
    del members[missing]

    with pytest.raises(TypeError, match=missing):
        type("Incomplete", (ModeDescriptor,), members)()


def test_members_written_as_properties_and_as_attributes_read_the_same() -> None:
    by_property, by_attribute = GainMode(), WidthsMode()

    assert (by_property.name, by_attribute.name) == ("gain", "widths")
    assert callable(by_property.convert)
    assert callable(by_attribute.convert)
    assert by_property.next_prohibited_modes == {"gain"}


def test_mode_without_a_search_says_so() -> None:
    with pytest.raises(SearchError, match="'plain' has no search"):
        _ = make_mode("plain").search_algorithm

    assert WidthsMode().search_algorithm is WidthSearcher


def test_summary_is_the_first_line_of_the_docstring() -> None:
    assert make_mode("plain", __doc__="\n  One line.\n\n  More.").summary == "One line."
    assert make_mode("plain", __doc__=None).summary == ""


def test_text_forms_show_the_name() -> None:
    assert str(WidthsMode()) == "widths"
    assert repr(WidthsMode()) == "<WidthsMode 'widths'>"


def test_preview_of_a_mode_says_nothing_unless_overridden() -> None:
    assert tuple(make_mode("plain").preview(None, NoConfig())) == ()


def test_compatibility_with_a_name_is_looked_up_in_the_registry_of_the_mode() -> None:
    first, second = make_mode("first", next_modes=frozenset()), make_mode("second")
    registry = ModeRegistry([first, second])

    with pytest.raises(IncompatibleModeError, match="nothing may follow"):
        registry["second"].assert_compatibility_as_next_mode_of("first")


def test_compatibility_with_a_name_needs_a_registered_mode() -> None:
    with pytest.raises(UnknownModeError, match="is not registered"):
        make_mode("second").assert_compatibility_as_next_mode_of("first")


def test_compatibility_with_a_descriptor_uses_what_that_one_declares() -> None:
    only = make_mode("only", next_modes={"other"})
    never = make_mode("never", next_prohibited_modes={"mode"})
    mode = make_mode("mode")

    with pytest.raises(IncompatibleModeError, match="only 'other' may follow"):
        mode.assert_compatibility_as_next_mode_of(only)
    with pytest.raises(IncompatibleModeError, match="which prohibits it"):
        mode.assert_compatibility_as_next_mode_of(never)
    mode.assert_compatibility_as_next_mode_of(make_mode("any"))
