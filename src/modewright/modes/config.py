# SPDX-License-Identifier: Apache-2.0
"""``ModeConfig``: what a user may set on a mode, validated once at the door.

A config is frozen: what was validated is what is recorded. The two ``update_for_*`` hooks of a mode
edit a config in place; the engine hands them an unsealed copy and records that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from modewright.errors import ConfigError, did_you_mean

C = TypeVar("C", bound="ModeConfig")


class ModeConfig(BaseModel):
    """Base of every mode's config: pydantic v2, unknown keys refused, values frozen.

    Give every field a default, so that the mode can be applied by its name alone, and a
    ``Field(description=...)``, which is what ``modewright modes NAME`` shows.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True)

    _sealed: bool = PrivateAttr(default=True)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse assignment unless this is the unsealed copy that an update hook edits."""
        if name in type(self).model_fields and self._sealed:
            raise ConfigError(
                f"{type(self).__name__} is frozen: {name!r} cannot be set. Make another one with "
                f"config.model_copy(update={{{name!r}: ...}}), or return a new config from convert."
            )
        super().__setattr__(name, value)

    def unsealed(self: C) -> C:
        """Return a deep copy whose fields may be assigned (and are validated when they are)."""
        copy = self.model_copy(deep=True)
        copy._sealed = False
        return copy

    def to_json(self) -> dict[str, Any]:
        """Return the config as plain JSON data, the form in which it is recorded."""
        return self.model_dump(mode="json", by_alias=True)


def build_config(config_class: type[C], value: object, *, where: str) -> C:
    """Validate ``value`` (``None``, a mapping or a config object) as a ``config_class``.

    Args:
        config_class: The mode's config class.
        value: What the user wrote; ``None`` means all defaults.
        where: What is configured and where, for the message ("mode 'quantize' (step 1 of 2)").

    Raises:
        ConfigError: The value does not validate; the message lists every problem.
    """
    if isinstance(value, config_class):
        return value.model_copy(deep=True)
    if value is None:
        value = {}
    if isinstance(value, ModeConfig):
        raise ConfigError(
            f"The config of {where} must be a {config_class.__name__} or a dict, but a "
            f"{type(value).__name__} was received: it belongs to another mode."
        )
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"The config of {where} must be a {config_class.__name__}, a dict or None, but "
            f"{value!r} of type {type(value).__name__} was received."
        )
    try:
        return config_class.model_validate(dict(value))
    except ValidationError as error:
        fields = [f.alias or n for n, f in config_class.model_fields.items()]
        raise ConfigError(
            f"The config of {where} is not valid:\n{describe_validation(error, fields)}"
        ) from error


def describe_validation(error: ValidationError, fields: list[str] | None = None) -> str:
    """Return one line for each problem that pydantic found: where, what is wrong, what came.

    Args:
        error: What pydantic raised.
        fields: The names that exist at the top level, to suggest one for a misspelt key.
    """
    lines = []
    for problem in error.errors(include_url=False):
        path = ".".join(str(part) for part in problem["loc"]) or "(the whole config)"
        if problem["type"] == "extra_forbidden":
            names = fields or []
            hint = did_you_mean(str(problem["loc"][-1]), names) if len(problem["loc"]) == 1 else ""
            known = f" Known: {', '.join(names)}." if names and len(problem["loc"]) == 1 else ""
            lines.append(f"  {path}: there is no such field.{hint}{known}")
        elif problem["type"] == "value_error":
            lines.append(f"  {path}: {problem['ctx']['error']}")
        else:
            received = repr(problem["input"])
            received = received if len(received) <= 80 else received[:77] + "..."
            lines.append(f"  {path}: {problem['msg']}; received {received}")
    return "\n".join(lines)
