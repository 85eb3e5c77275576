# SPDX-License-Identifier: Apache-2.0
"""How representations are written, and which contradict themselves."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from modewright.errors import ConfigError
from modewright.quantization.config import QuantizerOverride
from modewright.quantization.representation import QuantizerConfig
from modewright.quantization.schemes import SCHEMES, scheme

GROUP = QuantizerConfig(num_bits=4, granularity="group", group_size=64)


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": "group"},
        {"group_size": 32},
        {"granularity": "channel", "group_size": 32},
        {"granularity": "token"},
        {"num_bits": 1},
        {"num_bits": 9},
        {"group_size": 0, "granularity": "group"},
        {"bits": 4},
    ],
    ids=str,
)
def test_contradictions_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QuantizerConfig(**fields)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"num_bits": 3}, {"num_bits": 3, "granularity": "group", "group_size": 64}),
        ({"group_size": 32}, {"num_bits": 4, "granularity": "group", "group_size": 32}),
        ({"granularity": "channel"}, {"granularity": "channel", "group_size": None}),
        ({"symmetric": False}, {"symmetric": False, "group_size": 64}),
    ],
    ids=["bits", "group size", "granularity", "symmetric"],
)
def test_an_override_changes_what_it_says(
    override: dict[str, Any], expected: dict[str, Any]
) -> None:
    changed = QuantizerOverride(**override).on(GROUP)

    assert changed is not None
    assert expected.items() <= changed.model_dump().items()


def test_an_override_switches_on_and_off() -> None:
    assert QuantizerOverride(enable=False).on(GROUP) is None
    assert QuantizerOverride(enable=False, num_bits=4).on(None) is None
    assert QuantizerOverride().on(None) is None
    assert QuantizerOverride(enable=True).on(None) == QuantizerConfig()
    assert QuantizerOverride(num_bits=6).on(None) == QuantizerConfig(num_bits=6)
    assert QuantizerOverride(enable=True).on(GROUP) == GROUP


def test_schemes_are_named_for_what_they_are() -> None:
    for name, layer in SCHEMES.items():
        assert layer.weights is not None
        assert name.startswith(f"w{layer.weights.num_bits}a")
        activations = layer.input_activations
        assert f"a{activations.num_bits if activations else 16}" in name


def test_an_unknown_scheme_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'w4a16'"):
        scheme("w4a17")
