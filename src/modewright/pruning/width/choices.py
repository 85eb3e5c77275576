# SPDX-License-Identifier: Apache-2.0
"""Which groups may be cut, and to which widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from modewright.errors import MatchError
from modewright.matching import require_matches
from modewright.pruning.graph.groups import DimensionGraph, DimensionGroup
from modewright.pruning.width.config import WidthConfig


@dataclass(frozen=True)
class Choice:
    """The widths that one group may have.

    Attributes:
        group: The group.
        step: By how many units a width may change.
        least: The smallest width.
    """

    group: DimensionGroup
    step: int
    least: int

    @property
    def name(self) -> str:
        """The name of the group."""
        return self.group.name

    @property
    def widths(self) -> list[int]:
        """All widths, rising; the last one is the whole."""
        size = self.group.size
        return [*range(self.least, size, self.step), size]

    def narrower(self, width: int) -> int:
        """Return the next smaller width; the same if there is none."""
        below = [w for w in self.widths if w < width]
        return below[-1] if below else width

    def some_widths(self, count: int) -> list[int]:
        """Return at most ``count`` widths, spread evenly, the least and the whole among them."""
        every = self.widths
        if len(every) <= count:
            return every
        return [every[round(i * (len(every) - 1) / (count - 1))] for i in range(count)]


def choices(model: nn.Module, graph: DimensionGraph, config: WidthConfig) -> list[Choice]:
    """Return what may be cut of the groups that a config picks.

    Raises:
        MatchError: A pattern matches no group, or nothing is left that could be cut.
    """
    named = {g.name: model.get_submodule(_module(model, g)) for g in graph.groups}
    if not named:
        reasons = "".join(f"\n  {path}: {why}" for path, why in graph.untraced.items())
        raise MatchError(f"No dimension of {type(model).__name__} can be cut:{reasons}")
    wanted = require_matches(named, config.targets, "`targets` of the pruning mode").names
    spared = require_matches(named, config.ignore, "`ignore` of the pruning mode").names
    found = [
        _choice(group, config)
        for group in graph.groups
        if group.kind in config.kinds and group.name in wanted and group.name not in spared
    ]
    found = [choice for choice in found if choice.least < choice.group.size]
    if not found:
        raise MatchError(
            "`targets`, `ignore`, `kinds` and `divisor` of the pruning mode leave no dimension to "
            f"cut. There are: {'; '.join(f'{g.name} ({g.size} {g.kind})' for g in graph.groups)}."
        )
    return found


def _module(model: nn.Module, group: DimensionGroup) -> str:
    path = group.name.partition("#")[0]
    return path if path in dict(model.named_modules()) else ""


def _choice(group: DimensionGroup, config: WidthConfig) -> Choice:
    wide = group.size >= 2 * config.divisor and group.kind in ("channels", "ffn", "hidden")
    step = math.lcm(config.divisor if wide else 1, group.multiple)
    least = max(group.minimum, math.ceil(config.min_share * group.size), 1)
    least = min(group.size, -(-least // step) * step)
    return Choice(group, step, least)


def whole(found: Sequence[Choice]) -> dict[str, int]:
    """Return the widths of the whole network."""
    return {choice.name: choice.group.size for choice in found}


def smallest(found: Sequence[Choice]) -> dict[str, int]:
    """Return the least widths."""
    return {choice.name: choice.least for choice in found}
