# SPDX-License-Identifier: Apache-2.0
"""Families: groups that get one width, since a config has one number for all blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modewright.pruning.width.choices import Choice


@dataclass(frozen=True)
class Family:
    """Groups of one kind and size.

    Attributes:
        name: Kind and size, such as ``"ffn 1536"``.
        members: What may be cut of each.
    """

    name: str
    members: tuple[Choice, ...]

    @property
    def widths(self) -> list[int]:
        """The widths that all members may have, rising; the last one is the whole."""
        common = set.intersection(*(set(choice.widths) for choice in self.members))
        return sorted(common)

    @property
    def size(self) -> int:
        """The whole width."""
        return self.members[0].group.size


def families(found: Iterable[Choice]) -> list[Family]:
    """Return choices by kind and size, those with the fewest widths first."""
    by_name: dict[str, list[Choice]] = {}
    for choice in found:
        by_name.setdefault(f"{choice.group.kind} {choice.group.size}", []).append(choice)
    made = [Family(name, tuple(members)) for name, members in by_name.items()]
    return sorted(made, key=lambda family: (len(family.widths), family.name))


def kept_units(
    made: Sequence[Family], widths: Sequence[int], order: dict[str, list[int]]
) -> dict[str, list[int]]:
    """Return the units that stay by group name: of each group the first in its order.

    Args:
        made: The families.
        widths: One for each of them.
        order: By group name its units, the most important first.
    """
    return {
        choice.name: sorted(order[choice.name][:width])
        for family, width in zip(made, widths, strict=True)
        if width < family.size
        for choice in family.members
    }
