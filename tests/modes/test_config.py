# SPDX-License-Identifier: Apache-2.0
"""Configs are validated at the door, frozen inside, and recorded as JSON."""

from __future__ import annotations

import pytest
from pydantic import Field

from modewright.errors import ConfigError
from modewright.modes.config import ModeConfig, build_config


class Inner(ModeConfig):
    depth: int = Field(default=1, ge=1, description="Depth.")


class SomeConfig(ModeConfig):
    rate: float = Field(default=0.5, ge=0, le=1, description="Rate.")
    names: tuple[str, ...] = Field(default=("a",), description="Names.")
    inner: Inner = Field(default_factory=Inner, description="Inner.")
    options: dict[str, int] = Field(default_factory=dict, description="Options.")
    renamed: int = Field(default=0, alias="re-named", description="With an alias.")


def build(value: object) -> SomeConfig:
    return build_config(SomeConfig, value, where="mode 'some'")


def test_none_and_empty_mean_all_defaults() -> None:
    assert build(None) == build({}) == SomeConfig()


def test_unknown_key_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"mode 'some'(?s:.*)Did you mean 'rate'\?"):
        build({"rat": 1})


def test_unknown_nested_key_is_an_error_with_its_path() -> None:
    with pytest.raises(ConfigError, match=r"inner\.dept: there is no such field"):
        build({"inner": {"dept": 1}})


def test_all_problems_are_listed_with_what_was_received() -> None:
    with pytest.raises(ConfigError) as caught:
        build({"rate": 7, "inner": {"depth": 0}})

    assert "received 7" in str(caught.value)
    assert "inner.depth" in str(caught.value)


def test_config_of_another_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="belongs to another mode"):
        build(Inner())


@pytest.mark.parametrize("value", [3, "text", ["rate"]], ids=repr)
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"a dict or None"):
        build(value)


def test_config_object_is_copied_at_the_door() -> None:
    mine = SomeConfig(options={"x": 1})
    built = build(mine)
    mine.options["x"] = 2

    assert built.options == {"x": 1}


def test_assignment_is_refused_and_says_what_to_do() -> None:
    config = SomeConfig()

    with pytest.raises(ConfigError, match="model_copy"):
        config.rate = 0.25
    assert config.rate == 0.5


def test_unsealed_copy_takes_valid_assignments_and_leaves_the_original() -> None:
    config = SomeConfig(options={"x": 1})
    copy = config.unsealed()
    copy.rate = 0.25
    copy.options["x"] = 2

    assert (config.rate, config.options) == (0.5, {"x": 1})
    assert (copy.rate, copy.options) == (0.25, {"x": 2})
    with pytest.raises(ValueError, match="rate"):
        copy.rate = 2.0


def test_json_form_validates_to_the_same_config() -> None:
    config = build({"rate": 1, "re-named": 3, "names": ["b", "c"], "inner": {"depth": 2}})

    assert build(config.to_json()) == config
