# SPDX-License-Identifier: Apache-2.0
"""``WidthSearcher``: what the searches for widths share: groups, costs, trials, the outcome."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from modewright.calibration.forward import run_batch
from modewright.errors import DataError
from modewright.evaluation.cost import COST_NAMES
from modewright.modes.constraints import Constraints
from modewright.modes.searcher import BaseSearcher
from modewright.modes.state import state_of
from modewright.pruning.effect import Effect, some_batches
from modewright.pruning.graph import trace_dimensions
from modewright.pruning.importance.magnitude import magnitudes
from modewright.pruning.norms import (
    norm_statistics,
    recalibrate_norms,
    set_norm_statistics,
    tracking_norms,
)
from modewright.pruning.space import choose, chosen, open_space
from modewright.pruning.surgery import CutPlan, plan_cut, trial_cut
from modewright.pruning.width.choices import Choice, choices, smallest, whole
from modewright.pruning.width.config import WidthConfig
from modewright.pruning.width.costs import Costs, Widths


class WidthSearcher(BaseSearcher):
    """Base of the searches for widths.

    ``best`` holds ``widths`` and ``kept`` (by group the units that stay), ``score`` and ``costs``.

    Attributes:
        known: Measured costs by subnet, latencies among them; a search that goes on uses them.
        scores: Scores by subnet.
        order: By group its units, the most important first.
    """

    known: dict[str, dict[str, float]]
    scores: dict[str, float]
    order: dict[str, list[int]]

    @property
    def default_search_config(self) -> dict[str, Any]:
        """See the base class.

        ``batches``: how many calibration batches are used for scores. ``norm_batches``: how many
        to gather the statistics of batch norms of a subnet anew; 0: leave them.
        """
        return {**super().default_search_config, "batches": 8, "norm_batches": 8}

    @property
    def default_state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"known": {}, "scores": {}, "order": {}}

    def before_search(self) -> None:
        """Trace the network, and refuse constraints that cannot be met."""
        if self.dummy_input is None:
            raise DataError(
                "A search for widths runs the network to see how its dimensions hang together: "
                "pass dummy_input, or calibration batches."
            )
        open_space(self.model)
        self.graph = trace_dimensions(self.model, self.dummy_input)
        self.found = choices(self.model, self.graph, self._recorded_config())
        names = Constraints.parse(self.constraints, COST_NAMES).names
        self.costs = Costs(self.model, self.found, self.dummy_input, names, self.known)
        self.full = self.costs(whole(self.found))
        self.bound(self.full, self.costs(smallest(self.found)), names=COST_NAMES)
        calibration = self.config["calibration"]
        self.batches = self._some("batches") if calibration is not None else []
        scored = self.config["score_func"] is not None or self.config["loss_func"] is not None
        self._effect = None if scored or not self.batches else Effect(self.model, self.batches)
        if not self.order:
            self.order = self.ranked()
            self.save_search_checkpoint()

    def ranked(self) -> dict[str, list[int]]:
        """Return the units of every group, the most important first."""
        found = {c.name: magnitudes(self.model, c.group) for c in self.found}
        return {name: v.argsort(descending=True, stable=True).tolist() for name, v in found.items()}

    def after_search(self) -> None:
        """Let the network be the best subnet, with statistics of its own."""
        with self.trial(self.best["kept"]):
            gathered = norm_statistics(self.model)
        choose(self.model, self.groups, self.best["kept"], dict(self.graph.untraced))
        if self.adjusts_norms:
            set_norm_statistics(self.model, gathered, chosen(self.model).plan.kept)

    @property
    def groups(self) -> list[Any]:
        """The groups that may be cut."""
        return [choice.group for choice in self.found]

    def choice(self, name: str) -> Choice:
        """Return what may be cut of a group."""
        return next(choice for choice in self.found if choice.name == name)

    def kept(self, widths: Widths) -> dict[str, list[int]]:
        """Return the units that stay: the most important ones."""
        return {name: sorted(self.order[name][:width]) for name, width in widths.items()}

    def fits(self, widths: Widths) -> bool:
        """Whether a subnet satisfies the constraints."""
        return self.bounds is not None and self.bounds.satisfied_by(self.costs(widths))

    def excess(self, widths: Widths) -> float:
        """By how much a subnet exceeds the constraints, as parts of them."""
        return 0.0 if self.bounds is None else self.bounds.violation(self.costs(widths))

    def score_of(self, widths: Widths, kept: Mapping[str, Sequence[int]] | None = None) -> float:
        """Return how good a subnet is, from memory if it was tried before."""
        name = self.costs.key(widths)
        if name not in self.scores:
            with self.trial(self.kept(widths) if kept is None else kept):
                self.scores[name] = self.measure()
            self.save_search_checkpoint()
        return self.scores[name]

    @contextmanager
    def trial(self, kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """Let the network be a subnet for a while, with its norms' statistics gathered anew."""
        plan = plan_cut(self.model, self.groups, kept)
        with trial_cut(self.model, plan):
            self.adjust_norms(plan)
            yield

    def adjust_norms(self, plan: CutPlan) -> None:
        """Bring the statistics of norms up to date in a network that was cut as a plan says."""
        run = self.config["loss_func"] or run_batch  # which knows what of a batch is a label
        recalibrate_norms(self.model, self._norm_batches(), run)

    def measure(self) -> float:
        """Return how good the network is as it is now; higher is better."""
        return self.score() if self._effect is None else -self._effect(self.model)

    def set_best(self, widths: Widths, kept: Mapping[str, Sequence[int]] | None = None) -> None:
        """Make a subnet the outcome."""
        units = self.kept(widths) if kept is None else {n: list(u) for n, u in kept.items()}
        self.best = {
            "widths": dict(widths),
            "kept": units,
            "score": self.score_of(widths, units),
            "costs": self.costs(widths),
        }

    @property
    def adjusts_norms(self) -> bool:
        """Whether a subnet has statistics of its own in its norms."""
        return bool(self._norm_batches())

    def _norm_batches(self) -> list[Any]:
        needed = self.config["norm_batches"] and tracking_norms(self.model)
        return self._some("norm_batches") if needed and self.config["calibration"] else []

    def _some(self, option: str) -> list[Any]:
        return some_batches(self.config["calibration"], self.config[option])

    def _recorded_config(self) -> WidthConfig:
        """Return the config with which the mode opened the space."""
        state = state_of(self.model)
        if state is not None and len(state):
            config = state.records[-1].config_object()
            if isinstance(config, WidthConfig):
                return config
        return WidthConfig()


def refilled(searcher: WidthSearcher, widths: Widths, worth: Mapping[str, float]) -> dict[str, int]:
    """Widen groups again as far as the constraints allow, those first that are worth most."""
    now = dict(widths)
    growing = sorted(worth, key=lambda name: (-worth[name], name))
    while growing:
        name = growing[0]
        wider = [w for w in searcher.choice(name).widths if w > now[name]]
        trial = {**now, name: wider[0]} if wider else now
        if wider and searcher.fits(trial):
            now = trial
            growing = [*growing[1:], name]
        else:
            growing = growing[1:]
    return now
