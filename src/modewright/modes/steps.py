# SPDX-License-Identifier: Apache-2.0
"""What users write as "the modes to apply", turned into a list of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from modewright.errors import ConfigError
from modewright.modes.config import ModeConfig, build_config
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.registry import ModeRegistry, as_descriptor, check_rules

BareMode: TypeAlias = "str | ModeDescriptor[Any] | type[ModeDescriptor[Any]]"
ConfigLike: TypeAlias = "ModeConfig | Mapping[str, Any] | None"
Modes: TypeAlias = "BareMode | tuple[BareMode, ConfigLike] | Sequence[BareMode | tuple[BareMode, ConfigLike]] | None"  # noqa: E501
ModeKwargs: TypeAlias = "Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None"


@dataclass(frozen=True)
class Step:
    """One mode to apply: its descriptor, its validated config, and what is not recorded."""

    mode: ModeDescriptor[Any]
    config: ModeConfig
    kwargs: dict[str, Any] = field(default_factory=dict)


def split_modes(mode: Modes) -> list[tuple[BareMode, ConfigLike]]:
    """Return ``(mode, config)`` pairs for anything that may be written as modes.

    A name, a descriptor, its class, a pair ``(mode, config)``, or a sequence of these.

    Raises:
        ConfigError: It is something else.
    """
    if mode is None:
        return []
    if _is_bare(mode):
        return [(mode, None)]  # type: ignore[list-item]
    if _is_pair(mode):
        return [(mode[0], mode[1])]  # type: ignore[index, list-item]
    if isinstance(mode, (list, tuple)):
        pairs: list[tuple[BareMode, ConfigLike]] = []
        for item in mode:
            if _is_bare(item):
                pairs.append((item, None))
            elif _is_pair(item) or (isinstance(item, list) and _is_pair(tuple(item))):
                pairs.append((item[0], item[1]))
            else:
                raise ConfigError(_expected(item))
        return pairs
    raise ConfigError(_expected(mode))


def resolve_steps(mode: Modes, kwargs: ModeKwargs, registry: ModeRegistry) -> list[Step]:
    """Look up every mode and validate every config, before anything else happens.

    Raises:
        UnknownModeError: A name is not registered.
        ConfigError: A config does not validate, or ``kwargs`` do not fit the modes.
    """
    pairs = split_modes(mode)
    if pairs:
        registry.check()
    modes = [resolve_mode(bare, registry) for bare, _ in pairs]
    names = {*registry, *(m.name for m in modes)}
    for descriptor in modes:
        if descriptor.name not in registry:
            check_rules(descriptor, names)
    per_step = _split_kwargs(kwargs, len(pairs))
    steps = []
    for index, (descriptor, (_, config)) in enumerate(zip(modes, pairs, strict=True)):
        place = f" (step {index + 1} of {len(pairs)})" if len(pairs) > 1 else ""
        where = f"mode {descriptor.name!r}{place}"
        validated = build_config(descriptor.config_class, config, where=where)
        steps.append(Step(descriptor, validated, per_step[index]))
    return steps


def resolve_mode(bare: BareMode, registry: ModeRegistry) -> ModeDescriptor[Any]:
    """Return the descriptor that a bare mode stands for.

    Raises:
        UnknownModeError: A name is not registered.
        ConfigError: A descriptor bears the name of another, registered one.
    """
    if isinstance(bare, str):
        return registry[bare]
    descriptor = as_descriptor(bare)
    if descriptor.name in registry:
        registered = registry[descriptor.name]
        if type(registered) is not type(descriptor):
            raise ConfigError(
                f"The mode name {descriptor.name!r} belongs to {registry.owner(descriptor.name)}, "
                f"but {type(descriptor).__module__}.{type(descriptor).__qualname__} was passed "
                "under that name: a saved state would be restored by the wrong one. Rename it."
            )
    return descriptor


def _split_kwargs(kwargs: ModeKwargs, count: int) -> list[dict[str, Any]]:
    if kwargs is None:
        return [{} for _ in range(count)]
    if isinstance(kwargs, Mapping):
        return [dict(kwargs) for _ in range(count)]
    if isinstance(kwargs, (list, tuple)):
        if len(kwargs) != count:
            raise ConfigError(
                f"mode_kwargs must be one dict for all modes or one for each: {count} modes but "
                f"{len(kwargs)} entries were received."
            )
        if all(item is None or isinstance(item, Mapping) for item in kwargs):
            return [dict(item or {}) for item in kwargs]
    raise ConfigError(f"mode_kwargs must be a dict or a list of dicts; received {kwargs!r:.80}")


def _is_bare(item: object) -> bool:
    return isinstance(item, (str, ModeDescriptor)) or (
        isinstance(item, type) and issubclass(item, ModeDescriptor)
    )


def _is_pair(item: object) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and _is_bare(item[0])
        and (item[1] is None or isinstance(item[1], (Mapping, ModeConfig)))
    )


def _expected(item: object) -> str:
    return (
        "A mode is written as a name, a ModeDescriptor or its class, or a pair (mode, config) with "
        f"a dict or config object; several as a list of these. Received {item!r:.120}"
    )
