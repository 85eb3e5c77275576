# SPDX-License-Identifier: Apache-2.0
"""What may be set on the quantization modes, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn

import modewright
from modewright.errors import ConfigError
from modewright.quantization.config import (
    QuantizeConfig,
    QuantizerConfig,
    QuantizerOverride,
    Rule,
    SchemeConfig,
)
from modewright.quantization.schemes import SCHEMES, scheme

CHANNEL = QuantizerConfig(granularity="channel")
GROUP = QuantizerConfig(num_bits=4, granularity="group", group_size=64)
TOKEN = QuantizerConfig(granularity="token", dynamic=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 1}, "greater than or equal to 2"),
        ({"num_bits": 9}, "less than or equal to 8"),
        ({"granularity": "group"}, "group_size go together"),
        ({"granularity": "channel", "group_size": 32}, "group_size go together"),
        ({"granularity": "group", "group_size": 0}, "greater than or equal to 1"),
        ({"granularity": "token"}, "needs dynamic=True"),
        ({"granularity": "row"}, "granularity"),
        ({"bits": 4}, "bits"),
    ],
    ids=str,
)
def test_a_quantizer_that_contradicts_itself_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": TOKEN}, "weights have no tokens"),
        ({"input_activations": CHANNEL}, "input_activations can share scales by"),
        ({"output_activations": GROUP}, "output_activations can share scales by"),
    ],
    ids=["weights per token", "inputs per channel", "outputs in groups"],
)
def test_a_granularity_that_a_tensor_does_not_have_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        SchemeConfig(**fields)


@pytest.mark.parametrize(
    ("override", "base", "expected"),
    [
        pytest.param({}, CHANNEL, CHANNEL, id="nothing"),
        pytest.param({}, None, None, id="nothing on nothing"),
        pytest.param({"enable": False}, CHANNEL, None, id="off"),
        pytest.param({"enable": False, "num_bits": 4}, CHANNEL, None, id="off wins"),
        pytest.param({"enable": True}, CHANNEL, CHANNEL, id="on stays on"),
        pytest.param({"enable": True}, None, QuantizerConfig(), id="on from nothing"),
        pytest.param({"num_bits": 4}, None, QuantizerConfig(num_bits=4), id="bits from nothing"),
        pytest.param(
            {"num_bits": 4}, GROUP.model_copy(update={"num_bits": 8}), GROUP, id="bits alone"
        ),
        pytest.param(
            {"granularity": "channel"}, GROUP, CHANNEL.model_copy(update={"num_bits": 4}),
            id="no more groups",
        ),
        pytest.param({"group_size": 64, "num_bits": 4}, CHANNEL, GROUP, id="a size makes groups"),
        pytest.param(
            {"group_size": 32}, GROUP, GROUP.model_copy(update={"group_size": 32}), id="group size"
        ),
        pytest.param(
            {"granularity": "tensor", "dynamic": False}, TOKEN, QuantizerConfig(), id="made static"
        ),
        pytest.param(
            {"symmetric": False}, CHANNEL, CHANNEL.model_copy(update={"symmetric": False}),
            id="asymmetric",
        ),
    ],
)  # fmt: skip
def test_an_override_changes_what_it_names(
    override: dict[str, Any], base: QuantizerConfig | None, expected: QuantizerConfig | None
) -> None:
    assert QuantizerOverride(**override).on(base) == expected


@pytest.mark.parametrize(
    ("override", "base"),
    [
        pytest.param({"granularity": "group"}, CHANNEL, id="groups of no size"),
        pytest.param({"granularity": "tensor", "group_size": 8}, CHANNEL, id="size without groups"),
        pytest.param({"dynamic": False}, TOKEN, id="static tokens"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(
    override: dict[str, Any], base: QuantizerConfig
) -> None:
    with pytest.raises(ValidationError):
        QuantizerOverride(**override).on(base)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_found_by_its_name(name: str) -> None:
    assert scheme(name) is SCHEMES[name]
    assert QuantizeConfig(scheme=name).scheme == name


def test_none_is_the_name_of_no_scheme() -> None:
    assert scheme("none") is None


def test_the_name_of_a_scheme_says_its_bits() -> None:
    for name, layer in SCHEMES.items():
        weights, activations = name.removesuffix("_static").removeprefix("w").split("a")
        inputs = layer.input_activations
        assert layer.weights is not None
        assert layer.weights.num_bits == int(weights)
        assert (16 if inputs is None else inputs.num_bits) == int(activations)


def test_static_schemes_are_those_that_are_called_so() -> None:
    for name, layer in SCHEMES.items():
        inputs = layer.input_activations
        assert (inputs is not None and not inputs.dynamic) == name.endswith("_static")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param({"scheem": "w8a8"}, ["'scheem'", "scheme"], id="misspelt field"),
        pytest.param({"target": ["Linear"]}, ["Did you mean 'targets'"], id="missing s"),
        pytest.param({"scheme": "w8a9"}, ["no scheme 'w8a9'", "'w8a8'"], id="unknown scheme"),
        pytest.param({"rules": [{"scheme": "w8a8"}]}, ["rules.0.targets"], id="rule for nothing"),
        pytest.param({"rules": [{"targets": []}]}, ["rules.0.targets"], id="rule with no pattern"),
        pytest.param(
            {"rules": [{"targets": ["*"], "scheme": "x"}]}, ["rules.0.scheme"], id="rule's scheme"
        ),
        pytest.param(
            {"rules": [{"targets": ["*"], "weights": {"bits": 4}}]},
            ["rules.0.weights.bits"],
            id="misspelt field of a rule",
        ),
        pytest.param({"targets": "Linear"}, ["targets"], id="text for a list"),
        pytest.param({"on_unmatched": "ignore"}, ["on_unmatched"], id="unknown choice"),
    ],
)
def test_apply_mode_refuses_a_bad_config_and_says_what_was_meant(
    config: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        modewright.apply_mode(nn.Sequential(nn.Linear(2, 2)), [("quantize", config)])
    for word in ["mode 'quantize'", *words]:
        assert word.strip("'") in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        pytest.param(
            {"weights": {"granularity": "group"}}, "group_size go together", id="groups of no size"
        ),
        pytest.param(
            {"input_activations": {"granularity": "channel"}},
            "input_activations can share",
            id="inputs per channel",
        ),
        pytest.param(
            {"input_activations": {"dynamic": False}}, "needs dynamic=True", id="static tokens"
        ),
    ],
)
def test_a_rule_that_does_not_fit_the_scheme_is_an_error_that_numbers_it(
    rule: dict[str, Any], words: str
) -> None:
    rules = [{"targets": ["Linear"], "scheme": "w8a16"}, {"targets": ["Linear"], **rule}]
    if "input_activations" in rule:
        rules[0]["scheme"] = "w8a8"
    with pytest.raises(ConfigError, match=words) as caught:
        modewright.apply_mode(nn.Sequential(nn.Linear(2, 2)), [("quantize", {"rules": rules})])
    assert "rules[1]" in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        CHANNEL.num_bits = 4
    with pytest.raises(ValidationError):
        Rule(targets=("*",)).scheme = "w8a8"
