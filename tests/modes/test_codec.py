# SPDX-License-Identifier: Apache-2.0
"""Plain data with tensors: what is accepted, and that nothing is lost on the way to a file."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.modes.codec import (
    MAX_DEPTH,
    canonical,
    copy_data,
    dumps,
    join_tensors,
    loads,
    split_tensors,
)


class Problem(Exception):
    pass


class Color(str, enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


def clean(value: object) -> Any:
    return canonical(value, "data", error=Problem)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text().filter(lambda key: not key.startswith("$")), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
def test_json_survives_text_exactly(value: Any) -> None:
    assert loads(dumps(clean(value)), "text", error=Problem) == value


@given(JSON)
def test_canonical_form_is_a_fixed_point(value: Any) -> None:
    assert clean(clean(value)) == clean(value) == value


def test_tensors_are_split_off_and_joined_again() -> None:
    value = {"a": [1, torch.arange(3), {"b": torch.tensor(2.5)}], "c": None}
    data, tensors = split_tensors(clean(value), "state")

    assert sorted(tensors) == ["state/a/1", "state/a/2/b"]
    joined = join_tensors(loads(dumps(data), "x", error=Problem), tensors, "x", error=Problem)
    assert joined["a"][1].tolist() == [0, 1, 2]
    assert joined["a"][2]["b"].item() == 2.5
    assert joined["c"] is None


def test_tuples_enums_and_other_mappings_become_plain() -> None:
    value = clean(OrderedDict(pair=(1, 2), color=Color.RED, number=Number.ONE))

    assert value == {"pair": [1, 2], "color": "red", "number": 1}
    assert [type(v) for v in value.values()] == [list, str, int]


BAD = {
    "set": {1, 2},
    "bytes": b"x",
    "nan": math.nan,
    "infinity": -math.inf,
    "object": object(),
    "function": print,
    "dtype": torch.float32,
    "complex": 1j,
    "integer key": {1: 2},
    "reserved key": {"$tensor": "x"},
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_other_values_are_refused_with_their_place(value: object) -> None:
    with pytest.raises(Problem, match=r"data\.outer\[1\]"):
        clean({"outer": [0, value]})


def test_depth_is_bounded() -> None:
    nest: Any = 1
    for _ in range(MAX_DEPTH + 1):
        nest = [nest]

    assert clean(nest[0]) == nest[0]
    with pytest.raises(Problem, match="nested"):
        clean(nest)


def test_data_that_contains_itself_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)

    with pytest.raises(Problem, match="nested"):
        clean(circle)


def test_copy_shares_nothing() -> None:
    value = {"a": [torch.zeros(2)], "b": {"c": [1]}}
    copy = copy_data(value)
    value["a"][0].add_(1)
    value["b"]["c"].append(2)

    assert copy["a"][0].tolist() == [0, 0]
    assert copy["b"] == {"c": [1]}


BAD_TEXTS = {
    "not json": "{",
    "empty": "",
    "nan": '{"a":NaN}',
    "infinity": "[-Infinity]",
    "float that overflows": "[1e999]",
    "key twice": '{"a":1,"a":2}',
    "key twice, nested": '[{"b":{"a":1,"a":2}}]',
    "deep list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deeper than recorded data can be": "[" * 300 + "]" * 300,
    "not utf-8": b'{"a":"\xff\xfe"}',
    "huge integer": "1" * 10_000,
    "trailing text": "{} {}",
}


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_text_that_is_not_strict_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(Problem, match="not valid JSON"):
        loads(text, "file", error=Problem)


BAD_PLACEHOLDERS = {
    "missing": {"$tensor": "nowhere"},
    "of a wrong type": {"$tensor": 3},
    "with a list": {"$tensor": ["here"]},
    "with company": {"$tensor": "here", "more": 1},
}


@pytest.mark.parametrize("value", BAD_PLACEHOLDERS.values(), ids=BAD_PLACEHOLDERS)
def test_malformed_placeholder_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(Problem, match=r"\.x\[0\]"):
        join_tensors({"x": [value]}, {"here": torch.zeros(1)}, "state", error=Problem)
