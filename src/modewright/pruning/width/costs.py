# SPDX-License-Identifier: Apache-2.0
"""What a subnet costs: counted where that is exact, otherwise cut for trial and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modewright.evaluation.cost import measure_cost
from modewright.pruning.surgery import plan_cut, trial_cut
from modewright.pruning.width.choices import Choice

Widths = Mapping[str, int]


class Costs:
    """Costs of subnets by their widths; which units stay makes no difference to them.

    Args:
        model: The network.
        found: Its groups and their widths.
        dummy_input: What one call gets.
        names: The costs that are asked for.
        known: Costs by :func:`key`, which new ones are put into: the table that is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Sequence[Choice],
        dummy_input: Any,
        names: Sequence[str],
        known: dict[str, dict[str, float]],
    ) -> None:
        self._model, self._found, self._dummy_input = model, found, dummy_input
        self.names, self.known = tuple(names), known

    def __call__(self, widths: Widths) -> dict[str, float]:
        """Return what the subnet with these widths costs."""
        name = self.key(widths)
        missing = [n for n in self.names if n not in self.known.get(name, {})]
        if missing:
            groups = [choice.group for choice in self._found]
            kept = {group: list(range(width)) for group, width in widths.items()}
            with trial_cut(self._model, plan_cut(self._model, groups, kept)):
                measured = measure_cost(self._model, self._dummy_input, missing)
            self.known[name] = {**self.known.get(name, {}), **measured}
        return {n: self.known[name][n] for n in self.names}

    def key(self, widths: Widths) -> str:
        """Return the name of a subnet in the table."""
        return " ".join(str(widths[choice.name]) for choice in self._found)
