# SPDX-License-Identifier: Apache-2.0
"""What may follow what: the rules of order, checked for a whole sequence before anything runs.

A :class:`Position` is where a model stands after some modes: what was applied, which of these are
still open (the export stack), which traits hold. A mode may come next if

1. the last recorded mode's ``next_modes`` and ``next_prohibited_modes`` let it,
2. so do those of the mode on top of the export stack, also when others were applied in between,
3. no earlier mode that is still in force prohibits it; a mode is in force until its export mode
   has closed it, and one without an export mode for good,
4. an export mode closes what lies on top of the stack, and nothing else: a mode that names it as
   its ``export_mode``, or that it names in ``closes``,
5. the traits it requires hold and those it forbids do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from modewright.errors import IncompatibleModeError
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.registry import ModeRegistry
from modewright.modes.traits import trait_names

AnyMode = ModeDescriptor[Any]


@dataclass(frozen=True)
class Position:
    """Where a model stands after the modes of ``history``.

    Attributes:
        history: All modes applied so far, oldest first.
        open: Indices into ``history`` of the modes that wait for their export mode, outermost
            first: the export stack.
        closed: Indices of the modes that their export mode has closed.
        traits: The traits that hold now.
    """

    history: tuple[AnyMode, ...] = ()
    open: tuple[int, ...] = ()
    closed: frozenset[int] = frozenset()
    traits: frozenset[str] = frozenset()

    @classmethod
    def after_all(cls, modes: Iterable[AnyMode]) -> Position:
        """Return the position after modes that were applied, without checking them again."""
        position = cls()
        for mode in modes:
            position = position.after(mode)
        return position

    @property
    def last(self) -> AnyMode | None:
        """The mode that was applied last."""
        return self.history[-1] if self.history else None

    @property
    def top(self) -> AnyMode | None:
        """The innermost mode that waits for its export mode."""
        return self.history[self.open[-1]] if self.open else None

    @property
    def in_force(self) -> list[AnyMode]:
        """The modes whose prohibitions still count."""
        return [mode for i, mode in enumerate(self.history) if i not in self.closed]

    def after(self, mode: AnyMode) -> Position:
        """Return the position after one more mode."""
        is_open, closed = self.open, self.closed
        if mode.is_export_mode and is_open:
            is_open, closed = is_open[:-1], closed | {is_open[-1]}
        if mode.export_mode is not None:
            is_open = (*is_open, len(self.history))
        traits = (self.traits - frozenset(mode.removes)) | frozenset(mode.provides)
        return Position((*self.history, mode), is_open, closed, traits)

    def check(self, mode: AnyMode, registry: ModeRegistry | None = None) -> None:
        """Check that ``mode`` may come next.

        Args:
            mode: The mode to add.
            registry: Where to look for modes that would help, for the message.

        Raises:
            IncompatibleModeError: It may not; the message says why and what would make it right.
        """
        self._check_export(mode)
        for other in _distinct(self.last, self.top):
            try:
                mode.assert_compatibility_as_next_mode_of(other)
            except IncompatibleModeError as error:
                raise IncompatibleModeError(f"{error}{self._way_out(other)}") from error
        for other in self.in_force:
            if mode.name in (other.next_prohibited_modes or ()):
                raise IncompatibleModeError(
                    f"Mode {mode.name!r} is prohibited by {other.name!r}, which was applied before "
                    f"and is still in force.{self._way_out(other)}"
                )
        self._check_traits(mode, registry)

    def _check_export(self, mode: AnyMode) -> None:
        if not mode.is_export_mode:
            return
        top = self.top
        if top is None:
            raise IncompatibleModeError(
                f"Mode {mode.name!r} closes another mode, but none is open on this model. Apply "
                f"the mode that it exports first{_list(self.history, ' (applied so far: ', ')')}."
            )
        if top.export_mode != mode.name and top.name not in mode.closes:
            raise IncompatibleModeError(
                f"Mode {mode.name!r} cannot close {top.name!r}, the innermost open mode, whose "
                f"export mode is {top.export_mode!r}. Apply {top.export_mode!r} first."
            )

    def _check_traits(self, mode: AnyMode, registry: ModeRegistry | None) -> None:
        missing = frozenset(mode.requires) - self.traits
        if missing:
            helpers = _modes_that("provides", missing, registry)
            raise IncompatibleModeError(
                f"Mode {mode.name!r} requires a model that is {_and(missing)}, and this one is "
                f"not.{_list(helpers, ' Apply one of these first: ', '.')}"
            )
        present = frozenset(mode.forbids) & self.traits
        if present:
            helpers = _modes_that("removes", present, registry)
            helpers = [m for m in helpers if not frozenset(m.provides) & frozenset(mode.forbids)]
            raise IncompatibleModeError(
                f"Mode {mode.name!r} cannot be applied to a model that is {_and(present)}, as this "
                f"one is since {self._since(present)!r}.{_reasons(mode, present)}"
                f"{_list(helpers, ' Apply one of these first: ', '.')}"
            )

    def _since(self, traits: frozenset[str]) -> str:
        return next(m.name for m in reversed(self.history) if traits & frozenset(m.provides))

    def _way_out(self, other: AnyMode) -> str:
        open_names = {self.history[i].name for i in self.open}
        if other.export_mode is not None and other.name in open_names:
            return f" Close {other.name!r} with {other.export_mode!r} first."
        return ""


def check_sequence(
    position: Position, modes: Sequence[AnyMode], registry: ModeRegistry | None = None
) -> Position:
    """Check that ``modes`` may follow one after the other from ``position``.

    Returns:
        The position after all of them.

    Raises:
        IncompatibleModeError: One may not; the message names its place in the sequence.
    """
    for index, mode in enumerate(modes):
        try:
            position.check(mode, registry)
        except IncompatibleModeError as error:
            if len(modes) == 1:
                raise
            place = f"Step {index + 1} of {len(modes)}"
            raise IncompatibleModeError(f"{place}: {error}") from error
        position = position.after(mode)
    return position


def check_restorable(modes: Sequence[AnyMode]) -> None:
    """Check that what is saved of a sequence could be restored by itself.

    Modes with ``save_mode_in_state = False`` are not saved, so nothing that is may depend on them.

    Raises:
        IncompatibleModeError: A saved mode may not follow the saved ones before it.
    """
    saved = [mode for mode in modes if mode.save_mode_in_state]
    if len(saved) == len(modes):
        return
    try:
        check_sequence(Position(), saved)
    except IncompatibleModeError as error:
        left_out = _list([m for m in modes if not m.save_mode_in_state], "", "")
        raise IncompatibleModeError(
            f"A saved state could not be restored: {left_out} would not be in it "
            f"(save_mode_in_state = False), and without: {error}"
        ) from error


def _distinct(*modes: AnyMode | None) -> list[AnyMode]:
    return list({id(m): m for m in modes if m is not None}.values())


def _modes_that(
    member: str, traits: frozenset[str], registry: ModeRegistry | None
) -> list[AnyMode]:
    if registry is None:
        return []
    return [m for m in registry.loaded() if traits <= frozenset(getattr(m, member))]


def _reasons(mode: AnyMode, traits: frozenset[str]) -> str:
    found = [mode.reasons[trait] for trait in sorted(traits) if trait in mode.reasons]
    return f" The reason: {'; '.join(found)}." if found else ""


def _and(traits: frozenset[str]) -> str:
    return " and ".join(trait_names(traits))


def _list(modes: Sequence[AnyMode], before: str, after: str) -> str:
    return f"{before}{', '.join(m.name for m in modes)}{after}" if modes else ""
