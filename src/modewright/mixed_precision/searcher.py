# SPDX-License-Identifier: Apache-2.0
"""The search of ``auto_quantize``: score candidates once, then solve for any budget in no time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from modewright.errors import ConfigError, DataError, SearchError
from modewright.mixed_precision.costs import (
    COST_NAMES,
    Costs,
    Latencies,
    full_costs,
    measured_latencies,
    stored_costs,
)
from modewright.mixed_precision.divergence import divergence_scores
from modewright.mixed_precision.gradient import gradient_scores
from modewright.mixed_precision.observing import Observed, group_layers, observe
from modewright.mixed_precision.solver import solve, total
from modewright.mixed_precision.space import Space, put_in, space_of
from modewright.mixed_precision.trials import Trial
from modewright.modes.checkpoint import inspect
from modewright.modes.constraints import Constraints
from modewright.modes.searcher import BaseSearcher
from modewright.quantization.layers import fitted_scheme
from modewright.quantization.schemes import NO_SCHEME, scheme

SENSITIVITIES = ("gradient", "kl")
_SWEEP = 12  # budgets for which the table of points is solved


class AutoQuantizeSearcher(BaseSearcher):
    """Picks one scheme for every group of layers: the least predicted loss within all budgets.

    Constraints: ``effective_bits`` (of the chosen-for weights, scales and zero points included),
    ``size_bytes`` (of the whole model, packed), ``latency`` (of the chosen-for layers).
    """

    serves_other_constraints = True
    table: dict[str, Any]

    @property
    def default_search_config(self) -> dict[str, Any]:
        """All options.

        ``sensitivity``: ``gradient`` (second order, seconds) or ``kl`` (measured, minutes).
        ``loss``: ``auto``, ``kl`` or ``mse``, by which outputs are compared. ``probes``: passes
        backward for each batch. ``seed``: of their random vectors. ``table``: what another search
        scored, as its mode recorded it, or the path of a model that was saved with it.
        """
        return {
            **super().default_search_config,
            "sensitivity": "gradient",
            "loss": "auto",
            "probes": 2,
            "seed": 0,
            "table": None,
        }

    @property
    def default_state_dict(self) -> dict[str, Any]:
        """The scored table; empty at the start."""
        return {"table": {}}

    def sanitize_search_config(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """Fill in defaults.

        Raises:
            ConfigError: An option is unknown, or has a value that is.
        """
        options = super().sanitize_search_config(config)
        for name, known in (("sensitivity", SENSITIVITIES), ("loss", ("auto", "kl", "mse"))):
            if options[name] not in known:
                raise ConfigError(
                    f"{name} of auto_quantize is one of {', '.join(known)}; received "
                    f"{options[name]!r}."
                )
        if not isinstance(options["probes"], int) or options["probes"] < 1:
            raise ConfigError(
                f"probes of auto_quantize is a number from 1; received {options['probes']!r}."
            )
        return options

    def before_search(self) -> None:
        """Take a table that is there, and refuse budgets that no choice meets."""
        self.space = space_of(self.model)
        self.table = self._known_table()
        self._measured: Latencies | None = None
        groups = self.table.get("groups") or group_layers(self.model, self.space.layers, [])
        self._bound(groups)

    def run_search(self) -> None:
        """Score if need be, solve, and note what other budgets would give."""
        if not self.table:
            put_in(self.model, replace(self.space, chosen={}))  # as it was
            observed = self._observe()
            groups = group_layers(self.model, self.space.layers, observed.shared)
            costs = self._bound(groups)
            zeros = [[0.0] * len(self.space.candidates) for _ in groups]
            self._solve(zeros, costs)
            self.table = self._scored(groups, observed)
            self.save_search_checkpoint()
        costs = self._bound(self.table["groups"])
        if self._measured is not None:
            self.table["latency"] = asdict(self._measured)
        self.space.table = self.table
        chosen = self._solve(self.table["scores"], costs)
        self.points = []
        self._sweep(costs)
        names = [self.space.candidates[index] for index in chosen]
        self.space.chosen = {
            path: name
            for paths, name in zip(self.table["groups"], names, strict=True)
            for path in paths
        }
        self.best = {
            "costs": costs.of(chosen),
            "score": -total(self.table["scores"], chosen),
            "subnet": dict(self.space.chosen),
            "rules": self.space.rules(),
        }
        self.record(self.best["costs"], self.best["score"], self._counts(chosen))
        self.space.outcome = {
            "constraints": dict(self.constraints),
            "costs": self.best["costs"],
            "predicted_loss": -self.best["score"],
        }
        self.save_search_checkpoint()

    def after_search(self) -> None:
        """Put the chosen quantizers in."""
        put_in(self.model, self.space)

    # --- budgets ---------------------------------------------------------------------------------

    def _bound(self, groups: Sequence[Sequence[str]]) -> Costs:
        """Count costs, and check that each bound alone can be met."""
        costs = stored_costs(self.model, groups, self.space.candidates)
        full = full_costs(self.model, groups)
        if "latency" in self.constraints:
            latencies = self._latencies()
            table = latencies.table(groups)
            costs = replace(costs, tables={**costs.tables, "latency": table})
            full["latency"] = latencies.full
        self.bound(full, costs.smallest(), names=COST_NAMES)
        return costs

    def _latencies(self) -> Latencies:
        """Return what was measured: by this search, or as the table records it."""
        if self._measured is None and "latency" in self.table:
            self._measured = Latencies(**self.table["latency"])
        if self._measured is None:
            put_in(self.model, replace(self.space, chosen={}))
            self._measured = measured_latencies(
                self.model, self.space.layers, self.space.candidates, self.dummy_input
            )
        return self._measured

    def _solve(self, scores: list[list[float]], costs: Costs) -> list[int]:
        bounds = self.bounds or Constraints(())
        return solve(scores, costs.tables, costs.budgets(bounds))

    def _sweep(self, costs: Costs) -> None:
        """Record the best choices for budgets from the smallest to the largest that matters."""
        scores = self.table["scores"]
        name = next(iter(self.constraints))
        table = costs.tables[name]
        low = sum(min(row) for row in table)
        high = sum(max(row) for row in table)
        for step in range(_SWEEP + 1):
            budget = low + (high - low) * step / _SWEEP
            try:
                chosen = solve(scores, costs.tables, {name: budget})
            except SearchError:  # rounding at the lower end
                continue
            self.record(costs.of(chosen), -total(scores, chosen), self._counts(chosen))

    def _counts(self, chosen: Sequence[int]) -> dict[str, int]:
        """Return how many layers get each candidate."""
        counts = dict.fromkeys(self.space.candidates, 0)
        for paths, index in zip(self.table["groups"], chosen, strict=True):
            counts[self.space.candidates[index]] += len(paths)
        return counts

    # --- scores ----------------------------------------------------------------------------------

    def _known_table(self) -> dict[str, Any]:
        """Return a table that fits the space, from the checkpoint, the options or the record."""
        given = self.config["table"]
        for table in (self.table, _read_table(given), self.space.table):
            fitting = _fitting(table, self.space)
            if fitting:
                return fitting
        if given is not None:
            raise ConfigError(
                "The table that was given scores other layers, or lacks some of the candidates "
                f"{', '.join(self.space.candidates)}: it cannot serve this search."
            )
        return {}

    def _observe(self) -> Observed:
        batches = self.config["calibration"]
        if not isinstance(batches, Sequence) or not batches:
            raise DataError(
                "auto_quantize scores on data that it goes through several times: pass a list of "
                f"batches as calibration; received {type(batches).__name__}."
            )
        return observe(self.model, self.space.layers, batches)

    def _scored(self, groups: list[list[str]], observed: Observed) -> dict[str, Any]:
        batches = self.config["calibration"]
        trials = self._trials(groups, observed)
        reached = [all(path in observed.reached for path in paths) for paths in groups]
        seen = [paths for paths, there in zip(groups, reached, strict=True) if there]
        of_seen = {path: trials[path] for paths in seen for path in paths}
        common: dict[str, Any] = {"loss": self.config["loss"], "on_step": self.show_progress}
        if self.config["sensitivity"] == "kl":
            found = iter(divergence_scores(self.model, seen, of_seen, batches, **common))
        else:
            probes, seed = self.config["probes"], self.config["seed"]
            found = iter(
                gradient_scores(
                    self.model, seen, of_seen, batches, probes=probes, seed=seed, **common
                )
            )
        rows = [next(found) if there else None for there in reached]
        largest = max((max(row.values(), default=0.0) for row in rows if row), default=0.0) or 1.0
        scores = []
        for paths, row in zip(groups, rows, strict=True):
            if row is None:  # nothing is known of it but how well its weights are kept
                parts = [trials[p] for p in paths]
                row = {n: largest * sum(p[n].weight_error() for p in parts) for n in parts[0]}
            scores.append([float(row.get(name, 0.0)) for name in self.space.candidates])
        return {
            "sensitivity": self.config["sensitivity"],
            "candidates": list(self.space.candidates),
            "groups": [list(paths) for paths in groups],
            "scores": scores,
            "unreached": [p for paths, there in zip(groups, reached, strict=True) if not there
                          for p in paths],
        }  # fmt: skip

    def _trials(
        self, groups: Sequence[Sequence[str]], observed: Observed
    ) -> dict[str, dict[str, Trial]]:
        """Return by layer and candidate what the layer would become."""
        found: dict[str, dict[str, Trial]] = {}
        paths = [path for members in groups for path in members]
        for done, path in enumerate(paths, start=1):
            layer = self.model.get_submodule(path)
            found[path] = {
                name: Trial(layer, fitted_scheme(layer, wanted), observed.importance.get(path))
                for name in self.space.candidates
                if name != NO_SCHEME and (wanted := scheme(name)) is not None
            }
            self.show_progress(done, len(paths))
        return found


def _read_table(given: object) -> Mapping[str, Any]:
    """Return a table that is given, or that the mode recorded in a saved model."""
    if given is None or isinstance(given, Mapping):
        return given or {}
    if isinstance(given, (str, Path)):
        for record in inspect(given).modes:
            if record.get("name") == "auto_quantize":
                table: Mapping[str, Any] = record["metadata"]["table"]
                return table
        raise ConfigError(f"{given} was not saved with mode 'auto_quantize': it holds no table.")
    raise ConfigError(f"table is what a search scored, or a path; received {type(given).__name__}.")


def _fitting(table: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Return a table with the candidates of a space; empty if it does not hold them."""
    known = list(table.get("candidates", ()))
    layers = {path for paths in table.get("groups", ()) for path in paths}
    if not set(space.candidates) <= set(known) or layers != set(space.layers):
        return {}
    columns = [known.index(name) for name in space.candidates]
    fitted = {
        **table,
        "candidates": list(space.candidates),
        "scores": [[row[c] for c in columns] for row in table["scores"]],
    }
    if columns != list(range(len(known))):
        fitted.pop("latency", None)
    return fitted
