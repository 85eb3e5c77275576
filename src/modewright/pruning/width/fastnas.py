# SPDX-License-Identifier: Apache-2.0
"""``FastnasSearcher``: score every group at every width by itself, then combine.

The map of drops says how much the score falls if one group alone has a smaller width; it is made
monotone. Two subnets are read off it: the one whose groups all stay within the least tolerated drop
that satisfies the constraints (found by bisection), and the one that loses least in sum for what it
saves. Both are widened where room is left, and the one that scores better wins.
"""

from __future__ import annotations

from typing import Any

from modewright.pruning.width.choices import whole
from modewright.pruning.width.searcher import WidthSearcher, refilled


class FastnasSearcher(WidthSearcher):
    """Choose widths by a map of how much each costs in score."""

    serves_other_constraints = True

    @property
    def default_search_config(self) -> dict[str, Any]:
        """See the base class. ``widths``: how many widths of each group are scored."""
        return {**super().default_search_config, "widths": 8}

    def run_search(self) -> None:
        """Score the map, then find the best subnet in it."""
        self.points = []
        full = whole(self.found)
        self._tried(full)
        drops = self._map(full)
        candidates = [self._within(drops), self._least_sum(drops)]
        scored = [(self._tried(widths), widths) for widths in candidates]
        self.set_best(max(scored, key=lambda item: item[0])[1])

    def _map(self, full: dict[str, int]) -> dict[str, dict[int, float]]:
        """Return by group and width the drop of the score, rising as widths fall."""
        top = self.score_of(full)
        drops: dict[str, dict[int, float]] = {}
        total = sum(len(c.some_widths(self.config["widths"])) - 1 for c in self.found) + 3
        done = 1
        for choice in self.found:
            worst, found = 0.0, {choice.group.size: 0.0}
            for width in reversed(choice.some_widths(self.config["widths"])[:-1]):
                if not self.exhausted:
                    worst = max(worst, top - self._tried({**full, choice.name: width}, total))
                    found[width] = worst
                done += 1
            drops[choice.name] = found
        return drops

    def _tried(self, widths: dict[str, int], total: int | None = None) -> float:
        score = self.score_of(widths)
        self.record(self.costs(widths), score, dict(widths), total=total)
        return score

    def _within(self, drops: dict[str, dict[int, float]]) -> dict[str, int]:
        """Return the widest subnet of the least tolerated drop that satisfies the constraints."""
        levels = sorted({drop for found in drops.values() for drop in found.values()})

        def at(level: float) -> dict[str, int]:
            return {
                name: min(width for width, drop in found.items() if drop <= level)
                for name, found in drops.items()
            }

        low, high = 0, len(levels) - 1
        while low < high:
            middle = (low + high) // 2
            if self.fits(at(levels[middle])):
                high = middle
            else:
                low = middle + 1
        widths = self._shrunk(at(levels[high]))
        worth = {name: self._drop(drops[name], width) for name, width in widths.items()}
        return refilled(self, widths, worth)

    def _least_sum(self, drops: dict[str, dict[int, float]]) -> dict[str, int]:
        """Return the subnet that always gave up what cost least score for what it saved."""
        now = {name: max(found) for name, found in drops.items()}
        while not self.fits(now):
            best: tuple[float, str, int] | None = None
            excess = self.excess(now)
            for name, found in drops.items():
                for width in (w for w in found if w < now[name]):
                    saved = excess - self.excess({**now, name: width})
                    lost = found[width] - found[now[name]]
                    if saved > 0 and (best is None or (lost / saved, name, width) < best):
                        best = (lost / saved, name, width)
            if best is None:
                return self._shrunk(now)
            now[best[1]] = best[2]
        worth = {name: self._drop(drops[name], width) for name, width in now.items()}
        return refilled(self, now, worth)

    def _shrunk(self, widths: dict[str, int]) -> dict[str, int]:
        """Return a subnet that fits, narrower than one that may not (a map that was cut short)."""
        now = dict(widths)
        while not self.fits(now):
            for choice in self.found:
                now[choice.name] = choice.narrower(now[choice.name])
        return now

    def _drop(self, found: dict[int, float], width: int) -> float:
        return found[min(found, key=lambda known: abs(known - width))]
