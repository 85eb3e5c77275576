# SPDX-License-Identifier: Apache-2.0
"""What may follow what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modewright.errors import IncompatibleModeError
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.registry import ModeRegistry
from modewright.modes.sequence import Position, check_sequence
from modewright.modes.traits import Trait
from support.example_modes import make_mode

AnyMode = ModeDescriptor[Any]


def accepts(*modes: AnyMode) -> bool:
    try:
        check_sequence(Position(), modes)
    except IncompatibleModeError:
        return False
    return True


def problem(*modes: AnyMode, registry: ModeRegistry | None = None) -> str:
    """Why the last mode may not follow the others, which may follow one another."""
    position = check_sequence(Position(), modes[:-1])
    with pytest.raises(IncompatibleModeError) as caught:
        position.check(modes[-1], registry)
    return str(caught.value)


A, B, C = make_mode("a"), make_mode("b"), make_mode("c")
OPEN = make_mode("open", export_mode="close")
CLOSE = make_mode("close", is_export_mode=True)
OUTER = make_mode("outer", export_mode="close_outer")
CLOSE_OUTER = make_mode("close_outer", is_export_mode=True)


# --- next_modes and next_prohibited_modes of the last mode ---------------------------------------


def test_modes_without_rules_may_follow_in_any_order() -> None:
    assert accepts(A, B, A, C)


def test_next_modes_bind_what_follows_immediately() -> None:
    only_b = make_mode("only_b", next_modes={"b"})

    assert accepts(only_b, B, C)
    assert "only 'b' may follow" in problem(only_b, C)


def test_empty_next_modes_let_nothing_follow() -> None:
    last = make_mode("last", next_modes=frozenset())

    assert accepts(A, last)
    assert "nothing may follow" in problem(last, A)


def test_prohibited_mode_may_not_follow() -> None:
    assert "prohibits it" in problem(make_mode("no_b", next_prohibited_modes={"b"}), B)


# --- prohibitions look at the whole history ------------------------------------------------------


def test_prohibition_holds_when_others_were_applied_in_between() -> None:
    no_b = make_mode("no_b", next_prohibited_modes={"b"})

    assert "prohibited by 'no_b'" in problem(no_b, A, C, B)


def test_prohibition_lapses_when_its_mode_is_closed() -> None:
    opened = make_mode("open", export_mode="close", next_prohibited_modes={"b"})

    assert not accepts(opened, A, B)
    assert accepts(opened, A, CLOSE, B)


def test_prohibition_of_an_outer_mode_outlives_the_inner_ones_export() -> None:
    outer = make_mode("outer", export_mode="close_outer", next_prohibited_modes={"b"})

    assert "which prohibits it. Close 'outer' with" in problem(outer, OPEN, CLOSE, B)
    assert accepts(outer, OPEN, CLOSE, CLOSE_OUTER, B)


# --- the export stack ----------------------------------------------------------------------------


def test_export_closes_the_innermost_mode_first() -> None:
    assert accepts(OUTER, OPEN, CLOSE, CLOSE_OUTER)
    text = problem(OUTER, OPEN, CLOSE_OUTER)
    assert "cannot close 'open'" in text
    assert "Apply 'close' first" in text


def test_export_needs_an_open_mode() -> None:
    assert "none is open on this model" in problem(CLOSE)
    assert "applied so far: a, b" in problem(A, B, CLOSE)


def test_mode_cannot_be_closed_twice() -> None:
    assert "none is open" in problem(OPEN, CLOSE, CLOSE)


def test_mode_opened_twice_is_closed_twice() -> None:
    assert accepts(OPEN, OPEN, CLOSE, CLOSE)


def test_mode_can_be_opened_again_after_its_export() -> None:
    assert accepts(OPEN, CLOSE, OPEN, CLOSE)


def test_next_modes_of_an_open_mode_bind_across_those_in_between() -> None:
    opened = make_mode("open", export_mode="close", next_modes={"a", "close"})

    assert accepts(opened, A, A, CLOSE, B)
    text = problem(opened, A, B)
    assert "cannot follow 'open'" in text
    assert "Close 'open' with 'close' first." in text


def test_next_modes_of_an_outer_mode_rest_while_an_inner_one_is_open() -> None:
    outer = make_mode("outer", export_mode="close_outer", next_modes={"open", "close_outer"})

    assert accepts(outer, OPEN, A, CLOSE, CLOSE_OUTER) is True
    assert not accepts(outer, OPEN, CLOSE, A)


def test_export_mode_may_open_another_one() -> None:
    both = make_mode("close", is_export_mode=True, export_mode="close_outer")

    assert accepts(OPEN, both, CLOSE_OUTER)
    assert not accepts(OPEN, both, CLOSE_OUTER, CLOSE_OUTER)


# --- traits --------------------------------------------------------------------------------------


FUSES = make_mode("fuses", provides=frozenset({"tests:fused"}))
SPLITS = make_mode("splits", removes=frozenset({"tests:fused"}))
WANTS = make_mode("wants", requires=frozenset({"tests:fused"}))
REFUSES = make_mode("refuses", forbids=frozenset({"tests:fused"}))


def test_required_trait_must_hold() -> None:
    assert accepts(FUSES, A, WANTS)
    assert not accepts(WANTS)
    assert not accepts(FUSES, SPLITS, WANTS)


def test_forbidden_trait_must_not_hold() -> None:
    assert accepts(REFUSES, FUSES)
    assert accepts(FUSES, SPLITS, REFUSES)
    assert not accepts(FUSES, A, REFUSES)


def test_messages_about_traits_name_the_modes_that_would_help() -> None:
    registry = ModeRegistry([FUSES, SPLITS, WANTS, REFUSES])

    assert problem(WANTS, registry=registry).endswith("Apply one of these first: fuses.")
    text = problem(FUSES, REFUSES, registry=registry)
    assert "since 'fuses'" in text
    assert text.endswith("Apply one of these first: splits.")


def test_traits_may_be_written_as_members_or_as_strings() -> None:
    by_member = make_mode("by_member", provides=frozenset({Trait.SPARSE}))
    by_string = make_mode("by_string", requires=frozenset({"sparse"}))

    assert accepts(by_member, by_string)


def test_mode_that_removes_and_provides_a_trait_leaves_it() -> None:
    swaps = make_mode("swaps", removes=frozenset({"tests:x"}), provides=frozenset({"tests:x"}))

    assert check_sequence(Position(), [swaps]).traits == {"tests:x"}


# --- own rules, places, positions ----------------------------------------------------------------


def test_own_compatibility_check_of_a_mode_is_honoured() -> None:
    asked = []

    def check(self: AnyMode, other: AnyMode) -> None:
        asked.append(other.name)
        if other.name == "b":
            raise IncompatibleModeError("not after b, for a reason of its own.")

    picky = make_mode("picky", assert_compatibility_as_next_mode_of=check)

    assert accepts(A, picky)
    assert asked == ["a"]
    assert "for a reason of its own" in problem(B, picky)


def test_own_compatibility_check_may_waive_the_rule_of_the_neighbour_only() -> None:
    waiver = make_mode("waiver", assert_compatibility_as_next_mode_of=lambda self, other: None)

    assert accepts(make_mode("only_b", next_modes={"b"}), waiver)
    assert not accepts(make_mode("never", next_prohibited_modes={"waiver"}), waiver)


def test_message_names_the_step_of_a_longer_sequence() -> None:
    with pytest.raises(IncompatibleModeError, match=r"^Step 3 of 3: Mode 'close'"):
        check_sequence(Position(), [A, B, CLOSE])
    with pytest.raises(IncompatibleModeError, match=r"^Mode 'close'"):
        check_sequence(Position(), [CLOSE])


def test_position_knows_what_is_open_and_what_is_in_force() -> None:
    position = check_sequence(Position(), [OUTER, OPEN, CLOSE, A])

    assert position.last is A
    assert position.top is OUTER
    assert [m.name for m in position.in_force] == ["outer", "close", "a"]
    assert Position().last is Position().top is None


def test_incompatible_mode_error_is_an_assertion_error_for_older_code() -> None:
    with pytest.raises(AssertionError):
        check_sequence(Position(), [CLOSE])


# --- against a slow reference --------------------------------------------------------------------

NAMES = ("m0", "m1", "m2", "m3", "m4")
TRAITS = ("tests:p", "tests:q")
SETS = st.none() | st.frozensets(st.sampled_from(NAMES), max_size=4)
TRAIT_SETS = st.frozensets(st.sampled_from(TRAITS), max_size=1)


def fields(name: str) -> st.SearchStrategy[AnyMode]:
    return st.fixed_dictionaries(
        {
            "next_modes": st.none() | st.none() | SETS,
            "next_prohibited_modes": st.none() | SETS,
            "export_mode": st.none() | st.sampled_from(NAMES),
            "is_export_mode": st.booleans(),
            "requires": TRAIT_SETS,
            "provides": TRAIT_SETS,
            "removes": TRAIT_SETS,
            "forbids": TRAIT_SETS,
        }
    ).map(lambda members: make_mode(name, **members))


def reference_accepts(modes: Sequence[AnyMode]) -> bool:
    """The rules, restated from the documentation without any cleverness."""
    return all(_may_come(modes[:place], modes[place]) for place in range(len(modes)))


def _may_come(before: Sequence[AnyMode], mode: AnyMode) -> bool:
    waiting: list[AnyMode] = []  # the export stack
    in_force: list[AnyMode] = []
    traits: set[str] = set()
    for earlier in before:
        if earlier.is_export_mode:
            closed = waiting.pop()
            for place in reversed(range(len(in_force))):
                if in_force[place] is closed:
                    del in_force[place]
                    break
        if earlier.export_mode:
            waiting.append(earlier)
        in_force.append(earlier)
        for trait in TRAITS:
            if trait in earlier.removes:
                traits.discard(trait)
            if trait in earlier.provides:
                traits.add(trait)
    if mode.is_export_mode and (not waiting or waiting[-1].export_mode != mode.name):
        return False
    for other in [*before[-1:], *waiting[-1:]]:
        if other.next_modes is not None and mode.name not in other.next_modes:
            return False
    for other in [*before[-1:], *in_force]:
        if other.next_prohibited_modes is not None and mode.name in other.next_prohibited_modes:
            return False
    return set(mode.requires) <= traits and not set(mode.forbids) & traits


@given(
    modes=st.tuples(*map(fields, NAMES)),
    order=st.lists(st.integers(0, len(NAMES) - 1), min_size=1, max_size=7),
)
@settings(max_examples=500)
@example(modes=(OPEN, CLOSE, OUTER, CLOSE_OUTER, A), order=[2, 0, 1, 3, 4])
def test_sequence_is_accepted_exactly_if_the_reference_accepts_it(
    modes: tuple[AnyMode, ...], order: list[int]
) -> None:
    # Steps that are refused are left out, so that long sequences are reached.
    accepted: list[AnyMode] = []
    for index in order:
        longer = [*accepted, modes[index]]
        expected = reference_accepts(longer)
        assert accepts(*longer) is expected
        if expected:
            accepted = longer


def test_an_export_mode_may_close_modes_that_name_another() -> None:
    other_close = make_mode("pack", is_export_mode=True, closes=frozenset({"open"}))
    position = check_sequence(Position(), [OPEN, other_close])

    assert position.open == ()
    with pytest.raises(IncompatibleModeError, match="none is open"):
        position.check(CLOSE)
    with pytest.raises(IncompatibleModeError, match="cannot close 'outer'"):
        check_sequence(Position(), [OUTER, other_close])


def test_a_way_out_that_leads_nowhere_is_not_offered() -> None:
    traits = {"forbids": frozenset({Trait.PACKED, Trait.FAKE_QUANTIZED})}
    modes = [
        make_mode("fake", provides=frozenset({Trait.FAKE_QUANTIZED}), **traits),
        make_mode("fold", removes=frozenset({Trait.FAKE_QUANTIZED})),
        make_mode(
            "pack", removes=frozenset({Trait.FAKE_QUANTIZED}), provides=frozenset({Trait.PACKED})
        ),
    ]
    registry = ModeRegistry(modes)
    for name in ("fake", "fold", "pack"):
        registry[name]
    position = Position().after(registry["fake"])

    with pytest.raises(IncompatibleModeError, match=r"first: fold\.$"):
        position.check(registry["fake"], registry)
