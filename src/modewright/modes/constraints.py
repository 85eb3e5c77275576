# SPDX-License-Identifier: Apache-2.0
"""``Constraints``: upper bounds on what a model costs, absolute or relative to the whole model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from modewright.errors import ConfigError, SearchError, did_you_mean

CONSTRAINT_NAMES = (
    "params",
    "active_params",
    "size_bytes",
    "flops",
    "latency",
    "effective_bits",
)
"""What a bound may be on, unless a searcher says otherwise."""

_SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "kB": 1e3, "MB": 1e6, "GB": 1e9, "ms": 1e-3, "s": 1.0}
_UNITS = {"size_bytes": ("kB", "MB", "GB"), "latency": ("ms", "s")}
_VALUE = re.compile(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z%]*)\s*")
_ROUNDING = 1e-9  # a cost that equals its bound up to this part of it is within


@dataclass(frozen=True)
class Bound:
    """The largest value that one cost may have.

    Attributes:
        name: Of the cost.
        value: The bound: in the cost's unit, or a part of the whole model's cost.
        relative: Which of the two.
    """

    name: str
    value: float
    relative: bool = False

    def __str__(self) -> str:
        return f"{self.name} <= {f'{100 * self.value:g}%' if self.relative else f'{self.value:g}'}"


@dataclass(frozen=True)
class Constraints:
    """Several bounds, all of which must hold.

    Attributes:
        bounds: One for each cost that is bounded, in the order in which they were given.
    """

    bounds: tuple[Bound, ...]

    @classmethod
    def parse(
        cls, values: Mapping[str, object], names: Iterable[str] = CONSTRAINT_NAMES
    ) -> Constraints:
        """Read constraints as people write them.

        Args:
            values: By cost a number, or text: ``"60%"`` of what the whole model costs, ``"2e6"``,
                ``"30M"``; bytes also ``"70MB"``, seconds also ``"3ms"``.
            names: The costs that may be bounded.

        Raises:
            ConfigError: A name is unknown, a value is no positive number, or there are none.
        """
        known = tuple(names)
        if not values:
            raise ConfigError(
                f"A search needs at least one constraint on {', '.join(known)}; none was given."
            )
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"There is no constraint {name!r} here.{did_you_mean(str(name), known)} "
                    f"Known: {', '.join(known)}."
                )
        return cls(tuple(_bound(name, value) for name, value in values.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """The costs that are bounded."""
        return tuple(bound.name for bound in self.bounds)

    def resolve(self, full_costs: Mapping[str, float]) -> Constraints:
        """Return absolute bounds.

        Args:
            full_costs: What the whole model costs; relative bounds are parts of it.

        Raises:
            ConfigError: The cost of a relative bound is missing.
        """
        return Constraints(tuple(_resolved(bound, full_costs) for bound in self.bounds))

    def satisfied_by(self, costs: Mapping[str, float]) -> bool:
        """Whether all bounds, which must be absolute, hold.

        Raises:
            ConfigError: A bound is relative, or its cost is missing.
        """
        return self.violation(costs) == 0

    def violation(self, costs: Mapping[str, float]) -> float:
        """Return by how much the bounds are exceeded, as parts of them, summed; 0 if they hold.

        Raises:
            ConfigError: A bound is relative, or its cost is missing.
        """
        return sum(self._excess(bound, costs) for bound in self.bounds)

    def require_reachable(self, smallest: Mapping[str, float], what: str = "the smallest") -> None:
        """Refuse bounds that nothing in a search space can meet, before it is searched.

        Args:
            smallest: For each cost the least value in the search space.
            what: What has these costs, for the message: "the smallest subnet".

        Raises:
            SearchError: A bound is below the least value; the message names the closest one.
        """
        unmet = [bound for bound in self.bounds if self._excess(bound, smallest)]
        if unmet:
            asked = ", ".join(str(bound) for bound in unmet)
            nearest = ", ".join(f"{b.name} = {smallest[b.name]:.6g}" for b in unmet)
            raise SearchError(
                f"The constraint {asked} cannot be met: {what} has {nearest}, which is the closest "
                "that can be reached. Relax the bound, or allow more choices."
            )

    def to_json(self) -> dict[str, float | str]:
        """Return the bounds as :meth:`parse` reads them."""
        return {b.name: f"{100 * b.value:.12g}%" if b.relative else b.value for b in self.bounds}

    def __str__(self) -> str:
        return ", ".join(str(bound) for bound in self.bounds)

    def _excess(self, bound: Bound, costs: Mapping[str, float]) -> float:
        if bound.relative:
            raise ConfigError(
                f"The bound {bound} is relative: resolve it with what the whole model costs first."
            )
        excess = _cost(bound.name, costs) / bound.value - 1
        return excess if excess > _ROUNDING else 0.0


def _bound(name: str, value: object) -> Bound:
    relative, number = False, math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str) and (match := _VALUE.fullmatch(value)):
        digits, suffix = match.groups()
        relative = suffix == "%"
        allowed = ("", "%", "k", "M", "G", *_UNITS.get(name, ()))
        if suffix in allowed and digits.count(".") <= 1 and digits != ".":
            number = float(digits) * (0.01 if relative else _SUFFIXES.get(suffix, 1.0))
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(
            f"The constraint on {name!r} must be a positive number such as 2e6 or '30M', or a part "
            f"of the whole model's such as '60%'; received {value!r}."
        )
    return Bound(name, number, relative)


def _resolved(bound: Bound, full_costs: Mapping[str, float]) -> Bound:
    if not bound.relative:
        return bound
    return replace(bound, value=bound.value * _cost(bound.name, full_costs), relative=False)


def _cost(name: str, costs: Mapping[str, float]) -> float:
    if name not in costs:
        raise ConfigError(
            f"The cost {name!r} is bounded, but it was not measured: known are "
            f"{', '.join(costs) or 'none'}."
        )
    return costs[name]
