# SPDX-License-Identifier: Apache-2.0
"""Patterns of modules: what each form matches, and what is said of one that matches nothing."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modewright.errors import ConfigError, MatchError
from modewright.matching import match_modules, require_matches


class SpecialLinear(nn.Linear):
    """A subclass, to be found by the name of its base."""


def decoder(layers: int = 12) -> nn.ModuleDict:
    def layer() -> nn.ModuleDict:
        attention = {f"{letter}_proj": nn.Linear(2, 2) for letter in "qkvo"}
        mlp = {f"{name}_proj": nn.Linear(2, 2) for name in ("gate", "up", "down")}
        return nn.ModuleDict(
            {
                "input_layernorm": nn.LayerNorm(2),
                "self_attn": nn.ModuleDict(attention),
                "mlp": nn.ModuleDict(mlp),
            }
        )

    return nn.ModuleDict(
        {
            "model": nn.ModuleDict(
                {
                    "embed_tokens": nn.Embedding(3, 2),
                    "layers": nn.ModuleList([layer() for _ in range(layers)]),
                    "norm": nn.LayerNorm(2),
                }
            ),
            "lm_head": SpecialLinear(2, 3),
        }
    )


MODULES = dict(decoder().named_modules())
LAST = "model.layers.11.mlp"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        pytest.param("lm_head", {"lm_head"}, id="path"),
        pytest.param("model.layers.3.mlp.up_proj", {"model.layers.3.mlp.up_proj"}, id="deep path"),
        pytest.param(
            "*.q_proj", {f"model.layers.{i}.self_attn.q_proj" for i in range(12)}, id="star"
        ),
        pytest.param(
            "model.layers.[0-2].mlp", {f"model.layers.{i}.mlp" for i in range(3)}, id="set"
        ),
        pytest.param("model.layers.1?.mlp", {f"model.layers.{i}.mlp" for i in (10, 11)}, id="?"),
        pytest.param(
            f"{LAST}.*", {f"{LAST}.{n}_proj" for n in ("gate", "up", "down")}, id="inside"
        ),
        pytest.param("Embedding", {"model.embed_tokens"}, id="class"),
        pytest.param("nn.Embedding", {"model.embed_tokens"}, id="nn.class"),
        pytest.param("torch.nn.Embedding", {"model.embed_tokens"}, id="torch.nn.class"),
        pytest.param("SpecialLinear", {"lm_head"}, id="subclass"),
        pytest.param(r"re:.*\.(0|11)\.mlp", {"model.layers.0.mlp", LAST}, id="regular expression"),
        pytest.param("re:lm", set(), id="a regular expression must match the whole path"),
        pytest.param("Lm_Head", set(), id="case counts"),
        pytest.param("layers.0", set(), id="a path is matched as a whole"),
        pytest.param("linear", set(), id="a class name is matched as a whole"),
        pytest.param("Module", set(), id="nn.Module is no class to match"),
    ],
)
def test_what_a_pattern_matches(pattern: str, expected: set[str]) -> None:
    assert match_modules(MODULES, [pattern]).names == expected


def test_a_class_name_matches_instances_of_subclasses() -> None:
    linear = match_modules(MODULES, ["Linear"]).names
    assert "lm_head" in linear
    assert len(linear) == 12 * 7 + 1


def test_paths_come_in_the_order_of_the_model() -> None:
    matches = match_modules(MODULES, ["Linear", "lm_head"])
    assert matches.by_pattern["Linear"] == tuple(
        name for name, module in MODULES.items() if isinstance(module, nn.Linear)
    )


@pytest.mark.parametrize("pattern", ["*", "re:.*", "re:", "", "ModuleDict"])
def test_the_root_is_never_matched(pattern: str) -> None:
    assert "" not in match_modules(MODULES, [pattern]).names


def test_patterns_that_matched_nothing_are_reported() -> None:
    matches = match_modules(MODULES, ["lm_head", "nowhere", "Conv2d"])
    assert matches.unmatched == ("nowhere", "Conv2d")


def test_matches_are_returned_when_all_patterns_matched_something() -> None:
    assert require_matches(MODULES, ["lm_head"], "here").names == {"lm_head"}


def test_no_patterns_match_nothing_and_are_no_error() -> None:
    assert require_matches(MODULES, [], "here").names == frozenset()


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("model.layers.0.mlp.donw_proj", "model.layers.0.mlp.down_proj"),
        ("*.q_porj", "model.layers.0.self_attn.q_proj"),
        ("*.mlp.dwon_proj", "mlp.down_proj"),
        ("*.layernorm", "LayerNorm"),
        ("Liner", "Linear"),
        ("nn.Linaer", "Linear"),
        ("torch.nn.Embeding", "Embedding"),
        ("Layernorm", "LayerNorm"),
        ("lmhead", "lm_head"),
        ("head", "lm_head"),
        ("embed_token", "model.embed_tokens"),
        ("layers.0.self_attn.k_proj", "model.layers.0.self_attn.k_proj"),
        (r"re:model\.layers\.\d+\.mlp\.up_prj", "mlp.up_proj"),
    ],
)
def test_an_error_names_what_was_probably_meant(pattern: str, meant: str) -> None:
    with pytest.raises(MatchError, match="no module matches") as caught:
        require_matches(MODULES, [pattern], "`ignore` of mode 'quantize'")
    message = str(caught.value)
    assert message.startswith("`ignore` of mode 'quantize'")
    assert repr(pattern) in message
    first = message.split("nearest: ")[1].split(",")[0].strip("')\n ")
    assert meant in first, message


def test_an_error_names_every_pattern_that_matched_nothing_and_none_that_did() -> None:
    with pytest.raises(MatchError) as caught:
        require_matches(MODULES, ["lm_head", "nowhere", "Conv2d"], "here")
    named = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert [line.split()[0].split("(")[0] for line in named] == ["'nowhere'", "'Conv2d'"]


@pytest.mark.parametrize("pattern", ["*", "Linear", "x"])
def test_a_model_without_submodules_names_none(pattern: str) -> None:
    with pytest.raises(MatchError) as caught:
        require_matches({"": nn.Linear(2, 2)}, [pattern], "here")
    assert "nearest" not in str(caught.value)


@pytest.mark.parametrize(
    "pattern", ["re:(", "re:[", "re:*", "re:a{9999999999999999999}"], ids=lambda p: p[:6]
)
def test_a_malformed_regular_expression_is_an_error_that_shows_it(pattern: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(pattern)):
        match_modules(MODULES, [pattern])


@given(
    pattern=st.text(max_size=12)
    | st.text(alphabet="*?[]!-^.\\lm_head", max_size=12)
    | st.text(alphabet="()[]{}*+?|\\.^$abl1,", max_size=9).map(lambda text: f"re:{text}")
)
def test_any_text_is_a_pattern_or_a_config_error(pattern: str) -> None:
    small = {name: module for name, module in MODULES.items() if name.count(".") < 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # regular expressions that Python will read differently
        try:
            matches = match_modules(small, [pattern])
        except ConfigError:
            assert pattern.startswith("re:")
            return
        assert matches.names <= set(small) - {""}
        if matches.unmatched:
            with pytest.raises(MatchError):
                require_matches(small, [pattern], "here")
