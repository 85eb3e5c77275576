# SPDX-License-Identifier: Apache-2.0
"""Upper bounds on costs: how they are read, resolved and checked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modewright.errors import ConfigError, SearchError
from modewright.modes.constraints import Bound, Constraints

FULL = {"params": 1000.0, "flops": 5e6, "latency": 0.2, "size_bytes": 4000.0}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("params", 2e6, Bound("params", 2e6)),
        ("params", 7, Bound("params", 7.0)),
        ("params", "2e6", Bound("params", 2e6)),
        ("params", " 30M ", Bound("params", 30e6)),
        ("flops", "60%", Bound("flops", 0.6, relative=True)),
        ("flops", "12.5 %", Bound("flops", 0.125, relative=True)),
        ("size_bytes", "70MB", Bound("size_bytes", 70e6)),
        ("latency", "3ms", Bound("latency", 3e-3)),
    ],
)
def test_bounds_are_read_as_people_write_them(name: str, value: Any, expected: Bound) -> None:
    (bound,) = Constraints.parse({name: value}).bounds

    assert bound.name == expected.name
    assert bound.value == pytest.approx(expected.value)
    assert bound.relative is expected.relative


@pytest.mark.parametrize(
    "value",
    [0, -1, "0%", "-5%", "sixty", "", "%", ".", "1.2.3", "3ms", "5 parrots", float("nan"),
     float("inf"), True, None, [3], {"a": 1}],
    ids=repr,
)  # fmt: skip
def test_what_is_no_positive_number_is_refused_with_examples(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"'params'.*'60%'"):
        Constraints.parse({"params": value})


def test_unknown_constraint_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'parms'.*'params'"):
        Constraints.parse({"parms": 3})


def test_a_searcher_may_know_other_costs() -> None:
    assert Constraints.parse({"width": 3}, names=["width"]).names == ("width",)
    with pytest.raises(ConfigError, match="Known: width"):
        Constraints.parse({"params": 3}, names=["width"])


def test_no_constraint_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Constraints.parse({})


def test_relative_bounds_are_parts_of_the_whole_models_costs() -> None:
    bounds = Constraints.parse({"flops": "60%", "params": 400, "latency": "50%"}).resolve(FULL)

    assert {b.name: b.value for b in bounds.bounds} == pytest.approx(
        {"flops": 3e6, "params": 400, "latency": 0.1}
    )
    assert not any(bound.relative for bound in bounds.bounds)


def test_resolving_without_the_cost_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match=r"'flops'.*not measured"):
        Constraints.parse({"flops": "60%"}).resolve({"params": 3})


def test_relative_bounds_cannot_be_checked_before_they_are_resolved() -> None:
    with pytest.raises(ConfigError, match=r"flops <= 60%.*resolve"):
        Constraints.parse({"flops": "60%"}).satisfied_by(FULL)


def test_all_bounds_must_hold_and_equality_is_within() -> None:
    bounds = Constraints.parse({"params": 10, "flops": 20})

    assert bounds.satisfied_by({"params": 10, "flops": 20})
    assert not bounds.satisfied_by({"params": 10, "flops": 21})
    assert not bounds.satisfied_by({"params": 11, "flops": 20})


def test_violation_is_the_sum_of_the_parts_by_which_bounds_are_exceeded() -> None:
    bounds = Constraints.parse({"params": 10, "flops": 20})

    assert bounds.violation({"params": 15, "flops": 25}) == pytest.approx(0.75)
    assert bounds.violation({"params": 15, "flops": 5}) == pytest.approx(0.5)
    assert bounds.violation({"params": 5, "flops": 5}) == 0


def test_unreachable_bound_is_refused_with_the_closest_that_can_be_reached() -> None:
    bounds = Constraints.parse({"params": 10, "flops": 20})
    bounds.require_reachable({"params": 10, "flops": 3})

    with pytest.raises(SearchError, match=r"params <= 10 .* subnet has params = 12, .*closest"):
        bounds.require_reachable({"params": 12, "flops": 3}, "the smallest subnet")


@given(st.dictionaries(st.sampled_from(["params", "flops"]), st.floats(1e-3, 1e12), min_size=1),
       st.booleans())  # fmt: skip
def test_what_is_written_is_read_again(values: dict[str, float], relative: bool) -> None:
    given_values = {n: f"{v:.9g}%" if relative else v for n, v in values.items()}
    bounds = Constraints.parse(given_values)

    again = Constraints.parse(bounds.to_json())
    assert again.names == bounds.names
    for one, other in zip(again.bounds, bounds.bounds, strict=True):
        assert one.relative is other.relative
        assert one.value == pytest.approx(other.value, rel=1e-9)
