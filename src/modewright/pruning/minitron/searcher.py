# SPDX-License-Identifier: Apache-2.0
"""``MinitronSearcher``: how much to cut of width and how much of depth.

Units are ranked by what is lost without them (``importance.activation``), blocks by their measured
effect, one after another. Of both a little costs little and much costs much, so the best subnet is
a mixture: for every number of dropped blocks the widest network that fits is tried, and the one
whose predictions change least is chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from modewright.errors import DataError, SearchError
from modewright.evaluation.cost import measure_cost
from modewright.modes.state import state_of
from modewright.pruning.depth.blocks import removed, skip_blocks, skippable_blocks
from modewright.pruning.depth.searcher import DepthSearcher
from modewright.pruning.graph import trace_dimensions
from modewright.pruning.importance.activation import activation_importance
from modewright.pruning.minitron.families import families, kept_units
from modewright.pruning.minitron.mode import MinitronConfig
from modewright.pruning.space import choose, open_space
from modewright.pruning.surgery import plan_cut, trial_cut
from modewright.pruning.width.choices import choices

Subnet = dict[str, Any]
_TRACED_TOKENS = 16
_FEW = 2  # widths that are tried of a family beside the widest one that fits


class MinitronSearcher(DepthSearcher):
    """Choose one width for each family of dimensions, and which blocks to drop.

    ``best`` holds ``widths`` (by family), ``kept`` (by group the units that stay), ``dropped``,
    ``effect`` and ``costs``.

    Attributes:
        order: By group its units, the most important first.
        effects: Measured effects by subnet.
        sizes: Measured costs by subnet.
    """

    order: dict[str, list[int]]
    sizes: dict[str, dict[str, float]]

    @property
    def default_state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {**super().default_state_dict, "order": {}, "sizes": {}}

    def before_search(self) -> None:
        """Trace the network, rank its units, and refuse constraints that cannot be met."""
        if self.dummy_input is None:
            raise DataError(
                "Mode 'minitron' runs the network to see how its dimensions hang together: pass "
                "dummy_input, or calibration batches."
            )
        open_space(self.model)
        skip_blocks(self.model, ())
        own = self._recorded()
        self.graph = trace_dimensions(self.model, _short(self.dummy_input))
        self.families = families(choices(self.model, self.graph, own))
        self.groups = [c.group for family in self.families for c in family.members]
        blocks = len(skippable_blocks(self.model))
        self.most_dropped = int(blocks * own.max_depth_share)
        super().before_search()
        if not self.order:
            found = activation_importance(self.model, self.groups, self.config["calibration"])
            self.order = {
                name: values.argsort(descending=True, stable=True).tolist()
                for name, values in found.items()
            }
            self.save_search_checkpoint()

    def run_search(self) -> None:
        """Try mixtures of width and depth, and take the best."""
        self.points = []
        path = self._dropping_path()
        tried: dict[int, tuple[float, Subnet]] = {}
        coarse = range(0, len(path) + 1, 2)
        for count in coarse:
            self._try(count, path, tried)
        for _ in range(2):  # what lies beside the best, on both sides
            best = min(tried, key=lambda count: (tried[count][0], count), default=0)
            for count in (best - 1, best + 1):
                if 0 <= count <= len(path) and count not in tried and not self.exhausted:
                    self._try(count, path, tried)
        if not tried:
            raise SearchError(f"No mixture of width and depth meets {self.bounds}.")
        effect, subnet = min(tried.values(), key=lambda found: found[0])
        names = [family.name for family in self.families]
        self.best = {
            "widths": dict(zip(names, subnet["widths"], strict=True)),
            "kept": self._kept(subnet),
            "dropped": subnet["dropped"],
            "effect": effect,
            "costs": self._cost_of(subnet),
        }

    def after_search(self) -> None:
        """Let the network be the best subnet."""
        choose(self.model, self.groups, self.best["kept"], dict(self.graph.untraced))
        skip_blocks(self.model, self.best["dropped"])

    def _dropping_path(self) -> list[str]:
        """Return blocks in the order in which they are dropped, until that alone would do."""
        dropped: list[str] = []
        known: dict[str, float] = {}
        costs = self.full
        while len(dropped) < self.most_dropped and not self._fit(costs):
            if not self._candidates(dropped):
                break
            chosen = self._next(dropped, costs, known)
            known.pop(chosen, None)
            dropped.append(chosen)
            costs = self._costs(dropped)
        return dropped

    def _try(self, count: int, path: list[str], tried: dict[int, tuple[float, Subnet]]) -> None:
        """Measure the widest networks that fit without so many blocks; keep the best of them."""
        for widths in self._widest(path[:count]):
            subnet = {"widths": widths, "dropped": path[:count]}
            effect = self._effect_of_subnet(subnet)
            self.record(self._cost_of(subnet), -effect, subnet)
            if count not in tried or effect < tried[count][0]:
                tried[count] = (effect, subnet)

    def _widest(self, dropped: list[str]) -> Iterator[list[int]]:
        """Yield widths that fit and cannot be larger: few of most families, and the rest follows.

        The family with the most widths is made as wide as the others leave room for.
        """
        *others, last = self.families
        seen = []
        for fixed in itertools.product(*(f.widths[-_FEW:][::-1] for f in others)):
            low, high = 0, len(last.widths)  # all below low fit, none from high on does
            while low < high:
                middle = (low + high) // 2
                widths = [*fixed, last.widths[middle]]
                fit = self._fit(self._cost_of({"widths": widths, "dropped": dropped}))
                low, high = (middle + 1, high) if fit else (low, middle)
            if low:
                seen.append([*fixed, last.widths[low - 1]])
        yield from seen

    def _effect_of_subnet(self, subnet: Subnet) -> float:
        if not self._is_cut(subnet):
            return self._effect_of(subnet["dropped"])
        key = _key(subnet)
        if key not in self.effects:
            skip_blocks(self.model, subnet["dropped"])
            try:
                with self._cut(subnet):
                    self.effects[key] = self._effect(self.model)
            finally:
                skip_blocks(self.model, ())
            self.save_search_checkpoint()
        return self.effects[key]

    def _cost_of(self, subnet: Subnet) -> dict[str, float]:
        key = _key(subnet)
        if set(self.sizes.get(key, {})) != set(self.full):
            with self._cut(subnet), removed(self.model, subnet["dropped"]):
                self.sizes[key] = measure_cost(self.model, self.dummy_input, self.full)
        return self.sizes[key]

    def _smallest(self) -> dict[str, float]:
        """Return what the smallest subnet costs."""
        dropped: list[str] = []
        while len(dropped) < self.most_dropped and (found := self._candidates(dropped)):
            dropped.append(found[-1])
        widths = [family.widths[0] for family in self.families]
        return self._cost_of({"widths": widths, "dropped": dropped})

    @contextmanager
    def _cut(self, subnet: Subnet) -> Iterator[None]:
        with trial_cut(self.model, plan_cut(self.model, self.groups, self._kept(subnet))):
            yield

    def _kept(self, subnet: Subnet) -> Mapping[str, list[int]]:
        order = self.order or {g.name: list(range(g.size)) for g in self.groups}
        return kept_units(self.families, subnet["widths"], order)

    def _is_cut(self, subnet: Subnet) -> bool:
        return any(w < f.size for w, f in zip(subnet["widths"], self.families, strict=True))

    def _recorded(self) -> MinitronConfig:
        """Return the config with which the mode opened the space."""
        state = state_of(self.model)
        if state is not None and len(state):
            config = state.records[-1].config_object()
            if isinstance(config, MinitronConfig):
                return config
        return MinitronConfig()


def _key(subnet: Subnet) -> str:
    widths: Sequence[int] = subnet["widths"]
    return f"{' '.join(map(str, widths))} | {' '.join(sorted(subnet['dropped']))}"


def _short(dummy_input: Any) -> Any:
    """Return an input with few tokens, which shows as much of how dimensions hang together."""
    if isinstance(dummy_input, Mapping):
        return {key: _short(value) for key, value in dummy_input.items()}
    if isinstance(dummy_input, (tuple, list)):
        return type(dummy_input)(_short(value) for value in dummy_input)
    tokens = isinstance(dummy_input, torch.Tensor) and not dummy_input.is_floating_point()
    return dummy_input[:1, :_TRACED_TOKENS] if tokens and dummy_input.ndim == 2 else dummy_input
