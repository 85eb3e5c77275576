# SPDX-License-Identifier: Apache-2.0
"""Statistics that declare how they merge, so that batches and processes need no code elsewhere.

An observer is then nothing but a few statistics and an ``update``. That two halves of the data
merge to what the whole gives is a property the tests check for every rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

MergeRule = Literal["max", "min", "sum"]
_MERGE: dict[MergeRule, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "max": torch.maximum,
    "min": torch.minimum,
    "sum": torch.add,
}


class Statistic:
    """One tensor, gathered over batches.

    Args:
        rule: How two values become one.
    """

    def __init__(self, rule: MergeRule) -> None:
        self.rule = rule
        self.value: torch.Tensor | None = None

    def update(self, value: torch.Tensor) -> None:
        """Take in the value of one more batch."""
        value = value.detach()
        self.value = value if self.value is None else _MERGE[self.rule](self.value, value)

    def merge(self, other: Statistic) -> None:
        """Take in what another one gathered, on other data or another machine."""
        if other.value is not None:
            self.update(other.value)


class RangeObserver:
    """Watches one tensor: its smallest and largest value, and how many values were seen."""

    def __init__(self) -> None:
        self.minimum = Statistic("min")
        self.maximum = Statistic("max")
        self.count = Statistic("sum")

    def update(self, tensor: torch.Tensor) -> None:
        """Take in one batch; an empty one counts for nothing."""
        if tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            self.minimum.update(low)
            self.maximum.update(high)
            self.count.update(torch.tensor(tensor.numel()))

    def merge(self, other: RangeObserver) -> None:
        """Take in what another observer saw."""
        for own, theirs in zip(self._statistics, other._statistics, strict=True):
            own.merge(theirs)

    @property
    def range(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The smallest and largest value, scalars; ``None`` if nothing was seen."""
        if self.minimum.value is None or self.maximum.value is None:
            return None
        return self.minimum.value, self.maximum.value

    @property
    def _statistics(self) -> tuple[Statistic, ...]:
        return self.minimum, self.maximum, self.count
