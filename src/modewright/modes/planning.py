# SPDX-License-Identifier: Apache-2.0
"""``plan``: what a sequence of modes would do to a model, or why it may not, without doing it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from modewright.errors import ModewrightError
from modewright.modes.apply import check_model_like
from modewright.modes.config import build_config
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.model_like import ModelLike, all_modules, as_model, unwrap
from modewright.modes.registry import ModeRegistry, check_rules
from modewright.modes.sequence import Position, check_restorable
from modewright.modes.state import require_state_at_root, state_of
from modewright.modes.steps import BareMode, ConfigLike, Modes, resolve_mode, split_modes
from modewright.modes.traits import trait_names


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One step of a plan.

    Attributes:
        mode: The mode's name, as far as it is known.
        config: The validated config as JSON data; ``None`` if it does not validate.
        effects: What the mode would do, in lines.
        problem: Why it may not be applied and what would make it right; ``None`` if it may.
        error: The error that applying it would raise.
    """

    mode: str
    config: dict[str, Any] | None = None
    effects: tuple[str, ...] = ()
    problem: str | None = None
    error: ModewrightError | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sequence of modes would do.

    Attributes:
        applied: Names of the modes the model has already.
        steps: The steps up to the first problem, that one included.
        not_reached: Names of the steps after the first problem.
        traits: The traits that hold after the last possible step.
        open_modes: Modes that would still wait for their export mode.
    """

    applied: tuple[str, ...]
    steps: tuple[PlannedStep, ...]
    not_reached: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()
    open_modes: tuple[str, ...] = ()

    @property
    def problem(self) -> str | None:
        """The reason why the sequence may not be applied, or ``None``."""
        return self.steps[-1].problem if self.steps else None

    @property
    def ok(self) -> bool:
        """Whether the sequence may be applied."""
        return self.problem is None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["steps"] = [
            {f.name: getattr(step, f.name) for f in fields(step) if f.name != "error"}
            for step in self.steps
        ]
        return {**data, "ok": self.ok, "problem": self.problem}

    def require_ok(self) -> None:
        """Raise the error that applying the sequence would raise, if there is one."""
        if self.steps and self.steps[-1].error is not None:
            raise self.steps[-1].error

    def __str__(self) -> str:
        """Return the plan for people, a line or more for each step."""
        lines = [f"already applied: {', '.join(self.applied)}"] if self.applied else []
        for number, step in enumerate(self.steps, start=1):
            config = ", ".join(f"{k}={v!r}" for k, v in (step.config or {}).items())
            lines.append(f"{number}. {step.mode}({config})")
            lines.extend(f"     {effect}" for effect in step.effects)
            if step.problem is not None:
                lines.append(f"     NOT POSSIBLE: {step.problem}")
        lines.extend(f"-  {name} (not reached)" for name in self.not_reached)
        if self.ok:
            lines.append(f"then the model is: {', '.join(self.traits) or 'an ordinary module'}")
        return "\n".join(lines)


def plan(model: object, mode: Modes, *, registry: ModeRegistry) -> Plan:
    """Say what a sequence would do; see :func:`modewright.plan`."""
    root = None if model is None else as_model(model)
    if isinstance(root, nn.Module):
        root, _ = unwrap(root)
    state = None
    if isinstance(root, nn.Module):
        require_state_at_root(root, all_modules(root))
        state = state_of(root)
    applied = [record.descriptor for record in state or ()]
    position = Position.after_all(applied)
    pairs = split_modes(mode)
    registry.check()
    names = {*registry, *map(_bare_name, (bare for bare, _ in pairs))}
    steps: list[PlannedStep] = []
    for pair in pairs:
        step, descriptor = _planned(root, pair, position, registry, names)
        steps.append(step)
        if descriptor is None or step.problem is not None:
            break
        position = position.after(descriptor)
    return Plan(
        applied=tuple(m.name for m in applied),
        steps=tuple(steps),
        not_reached=tuple(_bare_name(bare) for bare, _ in pairs[len(steps) :]),
        traits=tuple(trait_names(position.traits)),
        open_modes=tuple(position.history[i].name for i in position.open),
    )


def _planned(
    root: nn.Module | ModelLike | None,
    pair: tuple[BareMode, ConfigLike],
    position: Position,
    registry: ModeRegistry,
    names: set[str],
) -> tuple[PlannedStep, ModeDescriptor[Any] | None]:
    bare, value = pair
    name = _bare_name(bare)
    config: dict[str, Any] | None = None
    effects: tuple[str, ...] = ()
    try:
        descriptor = resolve_mode(bare, registry)
        name = descriptor.name
        if name not in registry:
            check_rules(descriptor, names)
        validated = build_config(descriptor.config_class, value, where=f"mode {name!r}")
        config = validated.to_json()
        position.check(descriptor, registry)
        check_restorable([*position.history, descriptor])
        if root is not None:
            check_model_like(root, [descriptor])
        if isinstance(root, nn.Module):
            effects = tuple(descriptor.preview(root, validated))
    except ModewrightError as error:
        return PlannedStep(mode=name, config=config, problem=str(error), error=error), None
    return PlannedStep(mode=name, config=config, effects=effects), descriptor


def _bare_name(bare: BareMode) -> str:
    if isinstance(bare, str):
        return bare
    name = bare.name  # of a class, this is the name itself unless it is written as a property
    return name if isinstance(name, str) else getattr(bare, "__name__", "")
