# SPDX-License-Identifier: Apache-2.0
"""``DepthSearcher``: drops the block whose loss matters least, again and again.

Every choice is made by running the network without the block, on top of what was dropped before.
A block's effect grows as others are dropped, hardly ever shrinks; so the effects of the round
before are lower bounds, and only the blocks that look best by them are tried again (lazy greedy,
Minoux 1978). This takes a few runs a round instead of one for every block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from modewright.errors import ConfigError, SearchError
from modewright.evaluation.cost import COST_NAMES, measure_cost
from modewright.modes.constraints import Constraints
from modewright.modes.searcher import BaseSearcher
from modewright.pruning.depth.blocks import (
    noting_parts,
    removed,
    skip_blocks,
    skippable_blocks,
)
from modewright.pruning.effect import Effect, mean_loss, some_batches

_MEASURES = ("divergence", "loss")


class DepthSearcher(BaseSearcher):
    """Choose which blocks to drop.

    ``best`` holds ``dropped`` (paths, in the order in which they were chosen), ``effect`` (what the
    measure is without them) and ``costs``.

    Attributes:
        effects: By set of dropped blocks (paths joined by spaces) the measured effect. This is all
            that a search which is gone on with needs to choose as it did before.
        relief: By block what it costs: what the model saves without it.
        full: What the whole model costs.
        measured: By set of dropped blocks what was measured to be left.
    """

    serves_other_constraints = True

    effects: dict[str, float]
    relief: dict[str, dict[str, float]]
    full: dict[str, float]
    measured: dict[str, dict[str, float]]
    _effect: Callable[[nn.Module], float]

    @property
    def default_search_config(self) -> dict[str, Any]:
        """See the base class.

        ``batches``: on how many calibration batches effects are measured. ``measure``: what an
        effect is, unless there is a ``score_func``: ``"divergence"`` of the outputs from those of
        the whole network, or ``"loss"``, the mean of ``loss_func``. ``retries``: how many of the
        blocks that looked best are tried again in a round, at least.
        """
        own = {"batches": 8, "measure": "divergence", "retries": 3}
        return {**super().default_search_config, **own}

    @property
    def default_state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"effects": {}, "relief": {}, "full": {}, "measured": {}}

    def before_search(self) -> None:
        """Measure costs, refuse what cannot be reached, and run the whole network."""
        skip_blocks(self.model, ())
        names = Constraints.parse(self.constraints, COST_NAMES).names
        self._measure_costs(names)
        self.bound(self.full, self._smallest(), names=COST_NAMES)
        self._prepare_effect()

    def run_search(self) -> None:
        """Drop blocks until the constraints hold."""
        self.points = []
        dropped: list[str] = []
        costs = self.full
        known: dict[str, float] = {}  # what a block's loss added when it was last tried
        while not self._fit(costs):
            chosen = self._next(dropped, costs, known)
            dropped.append(chosen)
            known.pop(chosen, None)
            costs = self._costs(dropped)
            if self._fit(costs):  # by what each block saves; latencies do not add up
                costs = self._measured_costs(dropped)
            self.record(costs, -self._effect_of(dropped), list(dropped))
        self.best = {"dropped": dropped, "effect": self._effect_of(dropped), "costs": costs}

    def after_search(self) -> None:
        """Skip what was chosen."""
        skip_blocks(self.model, self.best["dropped"])

    def _prepare_effect(self) -> None:
        """Run the whole network, to compare others with it and to see what its blocks put out."""
        measure = self.config["measure"]
        if measure not in _MEASURES:
            raise ConfigError(
                f"The search option measure is {measure!r}; {' or '.join(_MEASURES)} was expected."
            )
        if measure == "loss" and self.config["loss_func"] is None:
            raise ConfigError("The search option measure is 'loss': pass loss_func too.")
        score_func, loss_func = self.config["score_func"], self.config["loss_func"]
        batches = some_batches(self.config["calibration"], self.config["batches"])
        with noting_parts(self.model):
            if score_func is not None:
                self._effect = lambda model: -float(score_func(model))
                self._effect(self.model)
            elif measure == "loss":
                self._effect = lambda model: mean_loss(model, batches, loss_func)
                self._effect(self.model)
            else:
                self._effect = Effect(self.model, batches)

    def _next(self, dropped: list[str], costs: dict[str, float], known: dict[str, float]) -> str:
        """Return the block that is dropped next: least harm for what it saves."""
        saved = self._saved(dropped, costs)
        useful = list(saved)
        before = self._effect_of(dropped)

        def harm(path: str) -> tuple[float, str]:
            added = known.get(path, math.inf if self.exhausted else -math.inf)
            return (added / saved[path] if added > 0 else added), path

        fresh: set[str] = set()
        while True:
            best = min(useful, key=harm)
            enough = len(fresh) >= min(len(useful), self.config["retries"])
            if (best in fresh and enough) or self.exhausted:
                return best
            again = min((path for path in useful if path not in fresh), key=harm)
            known[again] = self._effect_of([*dropped, again]) - before
            fresh.add(again)

    def _fit(self, costs: dict[str, float]) -> bool:
        return self.bounds is not None and self.bounds.satisfied_by(costs)

    def _saved(self, dropped: list[str], costs: dict[str, float]) -> dict[str, float]:
        """Return by block how much less the constraints are exceeded without it, if any."""
        if self.bounds is None:
            raise SearchError("The search has not begun: call search().")
        excess = self.bounds.violation(costs)
        saved = {
            path: excess - self.bounds.violation(_less(costs, self.relief[path]))
            for path in self._candidates(dropped)
        }
        if not any(amount > 0 for amount in saved.values()):
            raise SearchError(
                f"The constraint {self.bounds} cannot be met: no block that is left saves anything."
            )
        return {path: amount for path, amount in saved.items() if amount > 0}

    def _candidates(self, dropped: list[str]) -> list[str]:
        """Return the blocks that may be dropped next: one of each list stays."""
        left: dict[str, list[str]] = {}
        for path in skippable_blocks(self.model):
            if path not in dropped:
                left.setdefault(path.rpartition(".")[0], []).append(path)
        spare = self._holders_with_others()
        return [
            p for holder, paths in left.items() if len(paths) > 1 or holder in spare for p in paths
        ]

    def _holders_with_others(self) -> set[str]:
        """Return the lists that also hold something that is never dropped."""
        blocks = skippable_blocks(self.model)
        holders = {path.rpartition(".")[0] for path in blocks}
        return {
            holder
            for holder in holders
            if any(
                (f"{holder}.{name}" if holder else name) not in blocks
                for name, _ in self.model.get_submodule(holder).named_children()
            )
        }

    def _effect_of(self, dropped: list[str]) -> float:
        """Return the effect of dropping blocks, from memory if it was measured before."""
        key = " ".join(sorted(dropped))
        if key not in self.effects:
            skip_blocks(self.model, dropped)
            try:
                self.effects[key] = self._effect(self.model)
            finally:
                skip_blocks(self.model, ())
            self.save_search_checkpoint()
        return self.effects[key]

    def _measured_costs(self, dropped: list[str]) -> dict[str, float]:
        """Return what is left without blocks, measured."""
        key = " ".join(sorted(dropped))
        if key not in self.measured:
            with removed(self.model, dropped):
                self.measured[key] = measure_cost(self.model, self.dummy_input, self.full)
            self.save_search_checkpoint()
        return self.measured[key]

    def _measure_costs(self, names: tuple[str, ...]) -> None:
        """Measure the whole model, and it without each block; equal blocks cost the same."""
        if set(self.full) != set(names):
            self.relief, self.measured = {}, {}
            self.full = measure_cost(self.model, self.dummy_input, names)
        known: dict[str, dict[str, float]] = {}
        for path, block in skippable_blocks(self.model).items():
            shapes = [(n, tuple(p.shape), str(p.dtype)) for n, p in block.named_parameters()]
            kind = f"{type(block).__name__} {shapes}"
            if path not in self.relief and kind not in known:
                with removed(self.model, [path]):
                    without = measure_cost(self.model, self.dummy_input, names)
                known[kind] = _less(self.full, without)
            self.relief.setdefault(path, known.get(kind, {}))
            known.setdefault(kind, self.relief[path])

    def _smallest(self) -> dict[str, float]:
        """Return what the smallest subnet costs."""
        dropped: list[str] = []
        while candidates := self._candidates(dropped):
            dropped.append(candidates[-1])
        return self._costs(dropped)

    def _costs(self, dropped: list[str]) -> dict[str, float]:
        """Return what the model costs without blocks."""
        costs = self.full
        for path in dropped:
            costs = _less(costs, self.relief[path])
        return costs


def _less(costs: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: value - other[name] for name, value in costs.items()}
