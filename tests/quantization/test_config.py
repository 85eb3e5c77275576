# SPDX-License-Identifier: Apache-2.0
"""What may be set on the quantization modes, and what is refused with which words."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from torch import nn

import modewright
from modewright.errors import ConfigError
from modewright.formats.catalogue import FLOAT_NAMES, format_named
from modewright.formats.scaling import ScaleFormat
from modewright.quantization.config import (
    QuantizeConfig,
    QuantizerConfig,
    QuantizerOverride,
    Rule,
    SchemeConfig,
)
from modewright.quantization.representation import FormatName, ScaleFormatName
from modewright.quantization.schemes import SCHEMES, scheme

CHANNEL = QuantizerConfig(granularity="channel")
GROUP = QuantizerConfig(num_bits=4, granularity="group", group_size=64)
BLOCK = QuantizerConfig(granularity="block", block_size=(16, 16))
TOKEN = QuantizerConfig(granularity="token", dynamic=True)
# `w` and the bits of weights, `a` and those of activations; or a family with its bits, which holds
# for both unless `w` and `a` follow; then what is special. Keys and values have names of their own.
NAME = re.compile(
    r"(?:(?P<family>fp|nf|nvfp|mxfp|mxint)(?P<bits>\d))?"
    r"(?:(?:^|_)w(?P<w>\d)a(?P<a>\d+))?"
    r"(?:_(?P<variant>static|asym|channel|block))?"
)
FAMILIES = {  # beginning of the format's name, scale format, group size if the family has one
    "fp": ("fp", "fp32", None),
    "nf": ("nf", "fp32", 64),
    "nvfp": ("fp", "e4m3", 16),
    "mxfp": ("fp", "e8m0", 32),
    "mxint": ("int", "e8m0", 32),
}
LAYER_SCHEMES = {name: layer for name, layer in SCHEMES.items() if not name.startswith("kv")}


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
        ({"granularity": "block"}, "block_size go together"),
        ({"granularity": "channel", "block_size": (2, 2)}, "block_size go together"),
        ({"format": "fp5_e2m2"}, "format"),
        ({"format": "fp4_e2m1", "num_bits": 8}, "fp4_e2m1 has 4 bits, not 8"),
        ({"format": "nf4", "symmetric": False}, "a zero point needs format 'int'"),
        ({"scale_format": "e8m0", "symmetric": False}, "a zero point needs .* scale_format 'fp32'"),
        ({"scale_format": "e5m2"}, "scale_format"),
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
        ({"output_activations": BLOCK}, "output_activations can share scales by"),
        ({"kv_cache": CHANNEL}, "kv_cache can share scales by"),
        ({"output_activations": GROUP}, "output_activations in groups need dynamic=True"),
    ],
    ids=[
        "weights per token",
        "inputs per channel",
        "outputs in tiles",
        "keys and values per channel",
        "outputs in static groups",
    ],
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


@pytest.mark.parametrize("name", LAYER_SCHEMES)
def test_the_name_of_a_scheme_says_its_bits(name: str) -> None:
    said, layer = NAME.fullmatch(name), LAYER_SCHEMES[name]
    assert said is not None, "a name of another form: extend NAME and these tests"
    assert layer.weights is not None
    weights = said["w"] or said["bits"]
    activations = said["a"] or ("16" if said["family"] == "nf" else weights)
    inputs = layer.input_activations
    assert layer.weights.num_bits == int(weights)
    assert (16 if inputs is None else inputs.num_bits) == int(activations)


@pytest.mark.parametrize("name", LAYER_SCHEMES)
def test_the_name_of_a_scheme_says_its_family_of_formats(name: str) -> None:
    said, layer = NAME.fullmatch(name), LAYER_SCHEMES[name]
    assert said is not None
    start, scale_format, size = FAMILIES.get(said["family"], ("int", "fp32", None))
    for quantizer in filter(None, (layer.weights, layer.input_activations)):
        assert quantizer.format.startswith(start)
        assert quantizer.scale_format == scale_format
    assert layer.weights is not None
    assert size in (None, layer.weights.group_size)


@pytest.mark.parametrize("name", LAYER_SCHEMES)
def test_what_is_special_about_a_scheme_is_in_its_name(name: str) -> None:
    said, layer = NAME.fullmatch(name), LAYER_SCHEMES[name]
    assert said is not None
    assert layer.weights is not None
    assert layer.weights.symmetric != (said["variant"] == "asym" or layer.weights.num_bits == 2)
    assert (layer.weights.granularity == "block") == (said["variant"] == "block")
    if said["variant"] == "channel":
        assert layer.weights.granularity == "channel"
        assert SCHEMES[name.removesuffix("_channel")].weights != layer.weights


@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - LAYER_SCHEMES.keys()))
def test_schemes_of_keys_and_values_say_their_format_and_touch_nothing_else(name: str) -> None:
    cache = SCHEMES[name].kv_cache
    assert cache is not None
    assert SCHEMES[name] == SchemeConfig(kv_cache=cache)
    kind = "fp8" if "fp" in name else "int"
    assert cache.format.startswith(kind)
    assert cache.num_bits == int(name[-1])


def test_microscaled_formats_follow_the_specification() -> None:
    for name in ("mxfp4", "mxfp6", "mxfp8", "mxint8"):
        layer = SCHEMES[name]
        assert layer.weights is not None
        assert layer.input_activations == layer.weights.model_copy(update={"dynamic": True})
        assert (layer.weights.group_size, layer.weights.scale_format) == (32, "e8m0")


@pytest.mark.parametrize(
    ("fields", "name", "bits"),
    [
        ({}, "int8", 8),
        ({"num_bits": 3, "symmetric": False}, "uint3", 3),
        ({"format": "fp4_e2m1"}, "fp4_e2m1", 4),
        ({"format": "fp6_e3m2"}, "fp6_e3m2", 6),
        ({"format": "fp8_e5m2"}, "fp8_e5m2", 8),
        ({"format": "nf4"}, "nf4", 4),
    ],
    ids=str,
)
def test_a_quantizer_names_its_format_and_knows_its_bits(
    fields: dict[str, Any], name: str, bits: int
) -> None:
    quantizer = QuantizerConfig(**fields)
    assert (quantizer.format_name, quantizer.num_bits) == (name, bits)
    assert format_named(name).num_bits == bits


def test_the_names_of_formats_are_those_of_the_catalogue() -> None:
    assert set(get_args(FormatName)) == {"int", *FLOAT_NAMES}
    assert get_args(ScaleFormatName) == get_args(ScaleFormat)


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
