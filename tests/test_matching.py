# SPDX-License-Identifier: Apache-2.0
"""Patterns and what they match; nothing that matches nothing goes unsaid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modewright.errors import ConfigError, MatchError
from modewright.matching import match_modules, require_matches


class Own(nn.Linear):
    """A linear layer of a user's."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2, 2)
        self.down_proj = Own(2, 2)
        self.norm = nn.LayerNorm(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(12)])
        self.lm_head = nn.Linear(2, 2)


MODULES = dict(Model().named_modules())


def names(pattern: str) -> list[str]:
    return list(match_modules(MODULES, [pattern]).by_pattern[pattern])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("lm_head", ["lm_head"]),
        ("layers.1.q_proj", ["layers.1.q_proj"]),
        ("layers.1?.q_proj", ["layers.10.q_proj", "layers.11.q_proj"]),
        ("layers.[0-1].norm", ["layers.0.norm", "layers.1.norm"]),
        ("*.0.*", ["layers.0.q_proj", "layers.0.down_proj", "layers.0.norm"]),
        ("re:layers\\.1\\..*proj", ["layers.1.q_proj", "layers.1.down_proj"]),
        ("re:layers\\.1", ["layers.1"]),
        ("Model", []),
        ("layer", []),
    ],
)
def test_paths(pattern: str, expected: list[str]) -> None:
    assert names(pattern) == expected


@pytest.mark.parametrize("pattern", ["Linear", "nn.Linear", "torch.nn.Linear"])
def test_a_class_name_matches_subclasses_too(pattern: str) -> None:
    assert len(names(pattern)) == 25
    assert len(names("Own")) == 12


def test_the_root_is_never_matched() -> None:
    assert "" not in match_modules(MODULES, ["*", "re:.*", "Model"]).names


def test_what_matched_nothing_comes_back() -> None:
    assert match_modules(MODULES, ["Linear", "nothing"]).unmatched == ("nothing",)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("lmhead", "'lm_head'"),
        ("*.q_porj", "q_proj'"),
        ("layers.0.donw_proj", "'layers.0.down_proj'"),
        ("Liner", "'Linear'"),
        ("layer.3.norm", "'layers.3.norm'"),
    ],
)
def test_an_unmatched_pattern_is_an_error_that_names_the_nearest(
    pattern: str, nearest: str
) -> None:
    with pytest.raises(MatchError) as caught:
        require_matches(MODULES, ["Linear", pattern], "`targets` of mode 'x'")

    message = str(caught.value)
    assert repr(pattern) in message
    assert nearest in message
    assert "`targets` of mode 'x'" in message
    assert "'Linear' (" not in message  # what did match is not blamed


def test_a_malformed_expression_is_said() -> None:
    with pytest.raises(ConfigError, match=r"'re:\(' is no regular expression"):
        match_modules(MODULES, ["re:("])


@given(st.text(max_size=20))
def test_no_pattern_crashes(pattern: str) -> None:
    try:
        outcome: object = match_modules(MODULES, [pattern]).names
    except ConfigError as error:
        outcome = str(error)

    assert isinstance(outcome, (frozenset, str))
