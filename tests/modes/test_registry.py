# SPDX-License-Identifier: Apache-2.0
"""Where modes are found: registration, plug-ins, and rules about modes that do not exist."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modewright.errors import ConfigError, UnknownModeError
from modewright.modes.registry import ModeRegistry, ModeRow
from support.example_modes import GainMode, NoConfig, WidthsMode, example_registry, make_mode

GROUP = "tests.modes"
PLUGIN = """
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.config import ModeConfig


class Config(ModeConfig):
    pass


class Mode(ModeDescriptor):
    "Brought by a plug-in."
    name = "from_plugin"
    technique = "examples"
    config_class = Config
    next_modes = {next_modes}

    def convert(self, model, config):
        return model, {{}}

    def restore(self, model, config, metadata):
        return model
"""

Install = Callable[..., ModeRegistry]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Write plug-in modules and make entry points of them; return a registry that sees these."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(
        entries: dict[str, str] | list[tuple[str, str]], modes: Any = (), **sources: str
    ) -> ModeRegistry:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)
        pairs = entries.items() if isinstance(entries, dict) else entries
        found = [importlib.metadata.EntryPoint(n, value, GROUP) for n, value in pairs]
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda group: found if group == GROUP else []
        )
        return ModeRegistry(modes, entry_point_group=GROUP)

    yield install  # type: ignore[misc]
    for name in [n for n in sys.modules if n.startswith("acme_")]:
        del sys.modules[name]


# --- register, look up, remove -------------------------------------------------------------------


def test_registry_is_a_mapping_in_the_order_of_registration() -> None:
    registry = example_registry()

    assert list(registry)[:2] == ["gain", "widths"]
    assert len(registry) == 5
    assert "gain" in registry
    assert "gian" not in registry
    assert dict(registry.items())["gain"].name == "gain"
    assert registry.get("gain") is registry["gain"]
    assert registry.get("gian") is None
    assert "gain, widths" in repr(registry)


def test_register_is_a_class_decorator_that_returns_its_argument() -> None:
    registry = ModeRegistry()

    assert registry.register(WidthsMode) is WidthsMode
    assert registry["widths"].name == "widths"


def test_register_takes_an_instance_and_serves_that_one() -> None:
    mode = make_mode("mine")

    assert ModeRegistry([mode])["mine"] is mode


def test_name_that_is_taken_is_an_error_that_names_both_owners() -> None:
    registry = ModeRegistry([GainMode])
    other = make_mode("gain")

    with pytest.raises(ConfigError) as caught:
        registry.register(other)

    assert "support.example_modes.GainMode" in str(caught.value)
    assert "Mode_gain" in str(caught.value)
    assert isinstance(registry["gain"], GainMode)


@pytest.mark.parametrize("name", ["", None, 3], ids=repr)
def test_name_must_be_a_non_empty_string(name: object) -> None:
    with pytest.raises(ConfigError, match="non-empty string"):
        ModeRegistry([make_mode(name)])


@pytest.mark.parametrize(
    "mode", ["gain", object(), int, None], ids=["name", "object", "class", "none"]
)
def test_only_descriptors_can_be_registered(mode: Any) -> None:
    with pytest.raises(ConfigError, match="ModeDescriptor"):
        ModeRegistry().register(mode)


def test_incomplete_class_is_refused_with_what_is_missing() -> None:
    from modewright.modes.descriptor import ModeDescriptor

    class Incomplete(ModeDescriptor[NoConfig]):
        name = "incomplete"
        config_class = NoConfig

    with pytest.raises(ConfigError, match="does not define convert, restore"):
        ModeRegistry([Incomplete])


def test_unknown_name_is_a_key_error_that_names_the_nearest() -> None:
    with pytest.raises(UnknownModeError, match=r"no mode 'widhts'.*'widths'") as caught:
        _ = example_registry()["widhts"]

    assert isinstance(caught.value, KeyError)
    assert not str(caught.value).startswith("'")


def test_removed_mode_is_gone_and_its_name_is_free() -> None:
    registry = ModeRegistry([GainMode])
    registry.remove("gain")

    assert "gain" not in registry
    with pytest.raises(UnknownModeError):
        registry.remove("gain")
    registry.register(make_mode("gain"))
    assert not isinstance(registry["gain"], GainMode)


def test_copy_is_independent() -> None:
    registry = example_registry()
    copy = registry.copy()
    copy.register(make_mode("more"))
    copy.remove("gain")

    assert "more" not in registry
    assert "gain" in registry
    assert copy.owner("widths") == registry.owner("widths")


def test_view_holds_the_modes_of_one_technique() -> None:
    assert set(example_registry().view("examples")) == {"widths", "export_widths", "random_mask"}
    assert example_registry().view("nothing") == {}


def test_rows_of_a_table_are_imported_when_asked_for() -> None:
    target = "support.example_modes:GainMode"
    registry = ModeRegistry({"gain": ModeRow(target, "From the table.")})

    assert registry.listed_summary("gain") == "From the table."
    assert registry.owner("gain") == "support.example_modes.GainMode"
    assert isinstance(registry["gain"], GainMode)


def test_row_with_a_name_that_is_not_the_modes_own_is_an_error() -> None:
    registry = ModeRegistry({"other": ModeRow("support.example_modes:GainMode", "")})

    with pytest.raises(ConfigError, match="registered as mode 'other' but calls itself 'gain'"):
        _ = registry["other"]


def test_summary_of_a_registered_mode_is_its_docstring() -> None:
    assert (
        example_registry().listed_summary("widths")
        == "Let blocks use a part of their hidden units."
    )


# --- rules about modes ---------------------------------------------------------------------------


DANGLING = {
    "next_modes": {"next_modes": {"quantise"}},
    "next_prohibited_modes": {"next_prohibited_modes": {"quantise"}},
    "export_mode": {"export_mode": "quantise"},
}


@pytest.mark.parametrize(("member", "members"), DANGLING.items(), ids=DANGLING)
def test_rule_about_a_mode_that_does_not_exist_is_an_error(
    member: str, members: dict[str, Any]
) -> None:
    registry = ModeRegistry([make_mode("mine", **members), make_mode("quantize")])

    with pytest.raises(UnknownModeError, match=rf"{member} of mode 'mine'.*Did you mean 'quantize"):
        registry.check()


def test_rules_hold_again_once_the_missing_mode_is_registered() -> None:
    registry = ModeRegistry([make_mode("mine", next_modes={"later"})])
    with pytest.raises(UnknownModeError):
        registry.check()
    registry.register(make_mode("later"))
    registry.check()
    registry.remove("later")
    with pytest.raises(UnknownModeError):
        registry.check()


def test_mode_may_name_itself() -> None:
    ModeRegistry([make_mode("mine", next_prohibited_modes={"mine"})]).check()


CONTRADICTIONS = {
    "export missing from next_modes": (
        {"export_mode": "close", "next_modes": {"other"}},
        "can never be exported",
    ),
    "export prohibited": (
        {"export_mode": "close", "next_prohibited_modes": {"close"}},
        "prohibits its own",
    ),
    "unknown trait": ({"requires": frozenset({"fake_quantised"})}, "is not a trait"),
    "config class is none": ({"config_class": dict}, "subclass of ModeConfig"),
    "config class is an instance": ({"config_class": NoConfig()}, "subclass of ModeConfig"),
}


@pytest.mark.parametrize(("members", "text"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_rules_that_contradict_themselves_are_an_error(members: dict[str, Any], text: str) -> None:
    others = [make_mode("close", is_export_mode=True), make_mode("other")]

    with pytest.raises(ConfigError, match=text):
        ModeRegistry([make_mode("mine", **members), *others]).check()


# --- plug-ins ------------------------------------------------------------------------------------


def test_plugin_is_listed_without_being_imported_and_loaded_when_asked_for(
    install: Install,
) -> None:
    source = PLUGIN.format(next_modes=None)
    registry = install({"from_plugin": "acme_good:Mode"}, [GainMode], acme_good=source)

    assert list(registry) == ["gain", "from_plugin"]
    registry.check()
    assert registry.listed_summary("from_plugin") is None
    assert "acme_good" not in sys.modules
    assert registry["from_plugin"].summary == "Brought by a plug-in."
    assert "acme_good" in registry.owner("from_plugin")


BROKEN = {
    "raises on import": ("acme_bad:Mode", "raise ZeroDivisionError('half')", "ZeroDivisionError"),
    "exits on import": ("acme_bad:Mode", "raise SystemExit(3)", "SystemExit"),
    "is not Python": ("acme_bad:Mode", "def", "SyntaxError"),
    "lacks the object": ("acme_bad:Nothing", "", "AttributeError"),
    "is not installed": ("acme_missing:Mode", "", "ModuleNotFoundError"),
    "is no mode": ("acme_bad:Mode", "Mode = 3", "ConfigError"),
}


@pytest.mark.parametrize(("target", "source", "kind"), BROKEN.values(), ids=BROKEN)
def test_broken_plugin_is_an_error_for_who_asks_for_it_and_nobody_else(
    install: Install, target: str, source: str, kind: str
) -> None:
    registry = install({"bad": target}, example_registry().values(), acme_bad=source)

    registry.check()
    assert registry["gain"].name == "gain"
    assert set(registry.view("examples")) == {"widths", "export_widths", "random_mask"}
    with pytest.raises(ConfigError, match=rf"Mode 'bad' cannot be loaded.*{kind}") as caught:
        _ = registry["bad"]
    assert target.partition(":")[0] in str(caught.value)
    assert caught.value.__cause__ is not None


def test_place_of_the_failure_of_a_plugin_is_named(install: Install) -> None:
    registry = install({"bad": "acme_bad:Mode"}, acme_bad="\n\nraise ValueError('x')\n")

    with pytest.raises(ConfigError, match=r"acme_bad\.py:3"):
        _ = registry["bad"]


def test_plugin_under_another_name_than_its_own_is_an_error(install: Install) -> None:
    source = PLUGIN.format(next_modes=None)
    registry = install({"wrong": "acme_good:Mode"}, acme_good=source)

    with pytest.raises(ConfigError, match="calls itself 'from_plugin'"):
        _ = registry["wrong"]


def test_plugin_with_a_dangling_rule_is_an_error_when_it_is_loaded(install: Install) -> None:
    source = PLUGIN.format(next_modes={"gian"})
    registry = install({"from_plugin": "acme_good:Mode"}, [GainMode], acme_good=source)

    registry.check()
    with pytest.raises(UnknownModeError, match=r"names 'gian'.*Did you mean 'gain'"):
        _ = registry["from_plugin"]


def test_plugin_that_claims_a_taken_name_is_named_with_the_owner(install: Install) -> None:
    registry = install({"gain": "acme_good:Mode"}, [GainMode], acme_good="")

    with pytest.raises(ConfigError) as caught:
        _ = registry["gain"]
    assert "support.example_modes.GainMode" in str(caught.value)
    assert "acme_good:Mode" in str(caught.value)


def test_two_plugins_that_claim_one_name_are_both_named(install: Install) -> None:
    registry = install([("x", "acme_one:Mode"), ("x", "acme_two:Mode")])

    with pytest.raises(ConfigError, match=r"acme_one(?s:.*)acme_two"):
        _ = registry["x"]


def test_mode_cannot_be_registered_under_the_name_of_a_plugin(install: Install) -> None:
    registry = install({"mine": "acme_good:Mode"})

    with pytest.raises(ConfigError, match="acme_good"):
        registry.register(make_mode("mine"))


def test_entry_points_of_other_groups_are_left_alone(install: Install) -> None:
    install({"mine": "acme_good:Mode"})

    assert list(ModeRegistry(entry_point_group="other.group")) == []
    assert list(ModeRegistry()) == []
