# SPDX-License-Identifier: Apache-2.0
"""``GradnasSearcher``: cut the units that the loss feels least, for what each of them costs.

Importance by gradient estimates, in nats, what the loss gains by a unit; importance by norms, for
networks that are pruned without data, which share of the outputs of layers it has. Divided by what
the unit costs, in parts of what the constraints ask to save, it can be compared across groups, and
cutting all units below one threshold is the greedy solution of the knapsack. It is done in rounds:
each goes a part of the way, then importance is estimated anew for what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modewright.errors import ConfigError
from modewright.modes.model_like import all_modules
from modewright.modes.snapshot import Snapshot
from modewright.pruning.effect import some_batches
from modewright.pruning.importance.gradient import gradients, single_samples
from modewright.pruning.importance.norms import norm_input_means, remembered_costs
from modewright.pruning.norms import shift_means
from modewright.pruning.surgery import CutPlan, silence
from modewright.pruning.width.choices import Choice
from modewright.pruning.width.costs import Widths
from modewright.pruning.width.searcher import WidthSearcher, refilled

_TINY = 1e-12


class GradnasSearcher(WidthSearcher):
    """Choose units by squared gradients.

    Attributes:
        rounds_done: How many rounds are behind.
        importance: By group what its units are worth, as last estimated, ``[units]``.
        now: The units that are left, by group.
    """

    rounds_done: int
    importance: dict[str, torch.Tensor]
    now: dict[str, list[int]]

    @property
    def default_search_config(self) -> dict[str, Any]:
        """See the base class.

        ``rounds``: in how many steps units are cut. ``importance``: ``"gradient"``; or ``"norms"``,
        which needs no data: by what batch norms remember (see ``importance.norms``), which then
        make up for the mean of what is lost, unless ``norm_batches`` has them gather statistics
        anew. ``gradient_samples``: on how many samples out of the calibration batches importance
        is estimated, one by one.
        """
        own = {"rounds": 4, "gradient_samples": 256, "importance": "gradient"}
        return {**super().default_search_config, **own}

    @property
    def default_state_dict(self) -> dict[str, Any]:
        """See the base class."""
        own = {"rounds_done": 0, "importance": {}, "now": {}}
        return {**super().default_state_dict, **own}

    def before_search(self) -> None:
        """Look what norms remember, if that is asked for; then see the base class."""
        kind = self.config["importance"]
        if kind not in ("gradient", "norms"):
            raise ConfigError(f"importance is 'gradient' or 'norms'; received {kind!r}.")
        self._means: dict[str, torch.Tensor] = {}
        super().before_search()
        if kind == "norms":
            self._means = norm_input_means(self.model, self.dummy_input, {})
            self._worth = remembered_costs(self.model, self.groups, self.dummy_input)

    def adjust_norms(self, plan: CutPlan) -> None:
        """Gather statistics anew, or make up for the mean of what is lost."""
        if self._means and not self._norm_batches():
            now = norm_input_means(self.model, self.dummy_input, plan.kept)
            shift_means(self.model, self._means, now, plan.kept)
        else:
            super().adjust_norms(plan)

    @property
    def adjusts_norms(self) -> bool:
        """See the base class."""
        return bool(self._means) or super().adjusts_norms

    def score_of(self, widths: Widths, kept: Mapping[str, Sequence[int]] | None = None) -> float:
        """See the base class; without data and functions that score, what is lost counts."""
        given = (self.config[name] for name in ("calibration", "score_func", "loss_func"))
        if not self._means or any(value is not None for value in given):
            return super().score_of(widths, kept)
        units = self.kept(widths) if kept is None else kept
        return -sum(
            float(worth.sum() - worth[list(units[name])].sum())
            for name, worth in self._worth.items()
        )

    def run_search(self) -> None:
        """Cut units in rounds."""
        if not self.now:
            self.now = {c.name: list(range(c.group.size)) for c in self.found}
        rounds = int(self.config["rounds"])
        while self.rounds_done < rounds:
            last = self.exhausted or self.rounds_done == rounds - 1
            self.importance = self._estimate()
            widths = self._allocate(1.0 if last else (self.rounds_done + 1) / rounds)
            self.now = {name: self._top(name, width) for name, width in widths.items()}
            score = self.score_of(widths, self.now)
            self.record(self.costs(widths), score, dict(widths), total=rounds)
            self.rounds_done = rounds if last else self.rounds_done + 1
            self.save_search_checkpoint()
        self.set_best({name: len(units) for name, units in self.now.items()}, self.now)

    def ranked(self) -> dict[str, list[int]]:
        """Return nothing yet: units are ranked in every round."""
        return {c.name: list(range(c.group.size)) for c in self.found}

    def _estimate(self) -> dict[str, torch.Tensor]:
        """Return what each unit that is left is worth now; those that are gone, nothing."""
        if self._means:
            found = {name: worth.clone() for name, worth in self._worth.items()}
        else:
            found = self._gradients()
        for name, values in found.items():
            gone = torch.ones(len(values), dtype=torch.bool)
            gone[self.now[name]] = False
            values[gone] = -1.0
        return found

    def _gradients(self) -> dict[str, torch.Tensor]:
        snapshot = Snapshot(all_modules(self.model))
        try:
            silence(self.model, self.groups, self.now)
            return gradients(self.model, self.groups, self._samples(), self.config["loss_func"])
        finally:
            snapshot.roll_back()

    def _samples(self) -> list[Any]:
        count = int(self.config["gradient_samples"])
        given = self.config["calibration"]
        return single_samples(some_batches(given, count), count)

    def _top(self, name: str, width: int) -> list[int]:
        order = self.importance[name].argsort(descending=True, stable=True)
        return sorted(order[:width].tolist())

    def _allocate(self, part: float) -> dict[str, int]:
        """Return the widths that go a part of the way from the whole to the bounds."""
        start = {name: len(units) for name, units in self.now.items()}
        widths = start
        for _ in range(2):  # prices once where it begins, once where it ends
            prices = {c.name: self._price(c, widths) for c in self.found}
            ladder = {c.name: self._ladder(c, start, prices[c.name]) for c in self.found}
            widths = self._below_threshold(start, ladder, part)
        worth = {name: self._next_step(name, widths, prices[name]) for name in widths}
        return refilled(self, widths, worth) if part == 1.0 else widths

    def _price(self, choice: Choice, widths: Mapping[str, int]) -> float:
        """Return what a unit costs now, in parts of what must be saved."""
        width = widths[choice.name]
        other = choice.narrower(width)
        if other == width:
            other = min(w for w in choice.widths if w > width)
        here, there = self.costs(widths), self.costs({**widths, choice.name: other})
        bounds = {} if self.bounds is None else {b.name: b.value for b in self.bounds.bounds}
        total = 0.0
        for name, bound in bounds.items():
            to_save = self.full[name] - bound
            if to_save > 0:
                total += max(0.0, (here[name] - there[name]) / (width - other)) / to_save
        return max(total, _TINY)

    def _ladder(
        self, choice: Choice, start: Mapping[str, int], price: float
    ) -> list[tuple[float, int]]:
        """Return the widths of a group, falling, each with what a unit of the step is worth."""
        values = self.importance[choice.name].sort(descending=True).values
        steps, highest, width = [], 0.0, start[choice.name]
        while (narrower := choice.narrower(width)) < width:
            lost = float(values[narrower:width].clamp_min(0).sum()) / (width - narrower) / price
            highest = max(highest, lost)
            steps.append((highest, narrower))
            width = narrower
        return steps

    def _below_threshold(
        self, start: Mapping[str, int], ladder: Mapping[str, list[tuple[float, int]]], part: float
    ) -> dict[str, int]:
        levels = sorted({value for steps in ladder.values() for value, _ in steps})

        def at(index: int) -> dict[str, int]:
            if index < 0:
                return dict(start)
            return {
                name: min([start[name], *(w for v, w in steps if v <= levels[index])])
                for name, steps in ladder.items()
            }

        low, high = -1, len(levels) - 1
        while low < high:
            middle = (low + high) // 2
            if self._part_way(at(middle), part):
                high = middle
            else:
                low = middle + 1
        return at(high)

    def _part_way(self, widths: Mapping[str, int], part: float) -> bool:
        """Whether costs have come down by a part of what must be saved."""
        if self.bounds is None or part == 1.0:
            return self.fits(widths)
        costs = self.costs(widths)
        return all(
            costs[b.name] <= self.full[b.name] - part * (self.full[b.name] - b.value)
            for b in self.bounds.bounds
        )

    def _next_step(self, name: str, widths: Mapping[str, int], price: float) -> float:
        choice = self.choice(name)
        wider = [w for w in choice.widths if w > widths[name]]
        if not wider:
            return 0.0
        values = self.importance[name].sort(descending=True).values
        gained = float(values[widths[name] : wider[0]].clamp_min(0).sum())
        return gained / (wider[0] - widths[name]) / price
