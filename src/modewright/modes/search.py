# SPDX-License-Identifier: Apache-2.0
"""Searching what a mode opens: apply the mode if need be, run its searcher, say what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from torch import nn

from modewright.errors import IncompatibleModeError, SearchError
from modewright.modes.apply import apply_mode
from modewright.modes.config import build_config
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.model_like import all_modules, as_model, unwrap
from modewright.modes.registry import ModeRegistry
from modewright.modes.snapshot import Snapshot
from modewright.modes.state import state_of
from modewright.modes.steps import ConfigLike, ModeKwargs, Modes, resolve_mode, split_modes


@dataclass(frozen=True, kw_only=True)
class SearchPoint:
    """A point of the search space that was visited.

    Attributes:
        costs: What it costs, by name.
        score: How good it is; higher is better.
        subnet: What was chosen there: JSON values.
    """

    costs: dict[str, float]
    score: float
    subnet: Any = None


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What came out of a search.

    Attributes:
        model: The model, set to the best subnet.
        mode: The mode whose search space was searched.
        best: What the searcher found: JSON values and tensors.
        costs: What the best subnet costs, by name.
        constraints: The constraints as they were given.
        bounds: The same as absolute numbers, where the searcher resolved them.
        points: Everything that was visited, in order.
    """

    model: nn.Module = field(repr=False)
    mode: str
    best: dict[str, Any] = field(repr=False)
    costs: dict[str, float]
    constraints: dict[str, Any]
    bounds: dict[str, float]
    points: tuple[SearchPoint, ...] = field(repr=False)

    def pareto(self) -> tuple[SearchPoint, ...]:
        """Return the visited points that no other one beats, the cheapest first.

        A point is beaten by one that scores at least as well and costs no more in anything that was
        bounded, and is better in one of these.
        """
        names = [n for n in self.constraints if all(n in p.costs for p in self.points)]
        distinct = {tuple(_merits(p, names)): p for p in reversed(self.points)}
        front = [
            point
            for own, point in distinct.items()
            if not any(
                other != own and all(a <= b for a, b in zip(other, own, strict=True))
                for other in distinct
            )
        ]
        return tuple(sorted(front, key=lambda point: _merits(point, names)[1:] or [-point.score]))

    def to_dict(self) -> dict[str, Any]:
        """Return what a report shows, as JSON data: the Pareto points instead of all."""
        return {
            "mode": self.mode,
            "constraints": self.constraints,
            "bounds": self.bounds,
            "costs": self.costs,
            "visited": len(self.points),
            "pareto": [asdict(point) for point in self.pareto()],
        }


def _merits(point: SearchPoint, names: list[str]) -> list[float]:
    return [-point.score, *(point.costs[name] for name in names)]


def search(
    model: object,
    mode: Modes,
    constraints: Mapping[str, float | str],
    *,
    registry: ModeRegistry,
    dummy_input: Any = None,
    config: Mapping[str, Any] | None = None,
    mode_kwargs: ModeKwargs = None,
) -> SearchResult:
    """Search what a mode opens; see :func:`modewright.search`.

    Args:
        model: As for ``apply_mode``.
        mode: One mode: a name, or a pair with a config.
        constraints: Upper bounds.
        registry: Where the mode is looked up.
        dummy_input: An input of the model; the first calibration batch if left out.
        config: The searcher's config.
        mode_kwargs: What ``convert`` needs, if the mode is applied here.
    """
    pairs = split_modes(mode)
    if len(pairs) != 1:
        raise SearchError(f"A search is of one mode; {len(pairs)} were given.")
    ((bare, mode_config),) = pairs
    descriptor = resolve_mode(bare, registry)
    searcher = descriptor.search_algorithm()
    options = searcher.sanitize_search_config(config)
    if dummy_input is None and isinstance(options.get("calibration"), Sequence):
        dummy_input = next(iter(options["calibration"]), None)
    with _put_back(model, values=descriptor.writes_in_place):
        if not is_open(model, descriptor.name):
            model = apply_mode(model, mode, registry=registry, mode_kwargs=mode_kwargs)
        elif mode_config:
            _require_recorded(model, descriptor, mode_config)
        converted = unwrap(cast(nn.Module, model))[0]
        best = searcher.search(converted, constraints, dummy_input, config)
    bounds = {} if searcher.bounds is None else {b.name: b.value for b in searcher.bounds.bounds}
    return SearchResult(
        model=cast(nn.Module, model),
        mode=descriptor.name,
        best=best,
        costs=dict(best.get("costs", {})),
        constraints=dict(constraints),
        bounds=bounds,
        points=tuple(SearchPoint(**point) for point in searcher.points),
    )


def is_open(model: object, mode: str) -> bool:
    """Whether a mode was the last that was applied to a model, so that it can be searched now."""
    state = state_of(unwrap(model)[0]) if isinstance(model, nn.Module) else None
    return state is not None and len(state) > 0 and state.records[-1].name == mode


def _put_back(model: object, *, values: bool) -> Snapshot:
    """Return a context that puts a model back as it was before a search that failed."""
    root = as_model(model)
    modules = all_modules(unwrap(root)[0]) if isinstance(root, nn.Module) else []
    return Snapshot(modules, values=values, enabled=bool(modules))


def _require_recorded(model: object, mode: ModeDescriptor[Any], config: ConfigLike) -> None:
    """Check that a search space that is open was opened with this config."""
    state = state_of(unwrap(cast(nn.Module, model))[0])
    recorded = state.records[-1].config if state is not None else {}
    asked = build_config(mode.config_class, config, where=f"mode {mode.name!r}").to_json()
    changed = [name for name in asked if asked[name] != recorded.get(name)]
    if changed:
        raise IncompatibleModeError(
            f"The search space of mode {mode.name!r} is open on this model with another config: "
            f"{', '.join(changed)} differ. Leave the config out to search what is open, or take "
            "the unmodified model."
        )
