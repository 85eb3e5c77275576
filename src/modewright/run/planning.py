# SPDX-License-Identifier: Apache-2.0
"""What a recipe would do to a model: its steps, with the fallbacks that would be taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from modewright.modes.constraints import Constraints
from modewright.modes.planning import Plan, plan
from modewright.modes.registry import ModeRegistry
from modewright.modes.search import is_open
from modewright.recipes.schema import RecipeStep

Pairs = list[tuple[str, dict[str, Any]]]


def plan_recipe(model: nn.Module, steps: Sequence[RecipeStep], registry: ModeRegistry) -> Plan:
    """Return the plan of a recipe; a step that is not possible is replaced by its fallback.

    A step may still fail when it is applied, and its fallback be taken then.
    """
    chosen, notes = _chosen(model, [], steps, registry)
    found = plan(model, chosen, registry=registry)
    noted = tuple(
        replace(step, effects=(*notes.get(index, ()), *step.effects))
        for index, step in enumerate(found.steps)
    )
    return replace(found, steps=noted)


def _chosen(
    model: nn.Module, before: Pairs, steps: Sequence[RecipeStep], registry: ModeRegistry
) -> tuple[Pairs, dict[int, tuple[str, ...]]]:
    """Return the modes that would be applied after ``before``, and what to say of some of them."""
    pairs = list(before)
    notes: dict[int, tuple[str, ...]] = {}
    for step in steps:
        if step.search is not None:
            if not pairs and is_open(model, step.mode):
                continue  # what is open is searched again
            bounds = Constraints.parse(step.search.constraints, step.search.constraints)
            notes[len(pairs)] = (f"search: {bounds}",)
        pair = (step.mode, step.config)
        problem = None
        if step.fallback:
            problem = plan(model, [*pairs, pair], registry=registry).problem
        if problem is None:
            pairs.append(pair)
            continue
        notes[len(pairs)] = (f"fallback for {step.mode}, which is not possible: {problem}",)
        pairs, inner = _chosen(model, pairs, step.fallback, registry)
        notes = {**inner, **notes}
    return pairs, notes
