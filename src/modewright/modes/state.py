# SPDX-License-Identifier: Apache-2.0
"""What a model remembers of the modes applied to it: an ordered log of records.

The log lies on the root module, as a plain attribute that ``copy.deepcopy`` carries along. It is a
value: applying a mode puts a new, longer log in its place, so undoing means putting the old one
back, and reading it can never change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from modewright._version import __version__
from modewright.errors import (
    ApplyModeError,
    CheckpointError,
    IncompatibleModeError,
    ModewrightError,
)
from modewright.modes.codec import canonical, copy_data
from modewright.modes.config import ModeConfig, build_config
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.registry import ModeRegistry

SCHEMA_VERSION = 1
STATE_ATTRIBUTE = "_modewright_state"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a record came about; nothing here is needed to restore it.

    Attributes:
        seed: The seed of torch's random numbers while the mode was converted.
        modewright_version: The version of modewright that converted.
        owner: The dotted path of the descriptor's class.
        fallback_for: Name of the mode that failed and in whose place this one was taken.
        fallback_reason: Why that mode failed.
    """

    seed: int | None = None
    modewright_version: str = __version__
    owner: str = ""
    fallback_for: str | None = None
    fallback_reason: str | None = None

    @classmethod
    def parse(cls, data: object) -> Provenance:
        """Read what a file says; a field of the wrong type is left out, for it decides nothing."""
        if not isinstance(data, Mapping):
            return cls(modewright_version="")
        texts = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        seed = texts.pop("seed", None)
        known = {k: v for k, v in texts.items() if isinstance(v, str)}
        return cls(seed=seed if type(seed) is int else None, **known)


@dataclass(frozen=True, kw_only=True)
class ModeRecord:
    """One applied mode: what was asked for, and what is needed to rebuild it.

    Attributes:
        descriptor: The mode.
        config: The config as JSON data.
        metadata: What ``convert`` returned: JSON data and tensors.
        provenance: How it came about.
    """

    descriptor: ModeDescriptor[Any]
    config: dict[str, Any]
    metadata: dict[str, Any]
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def name(self) -> str:
        """The mode's name."""
        return self.descriptor.name

    def config_object(self) -> ModeConfig:
        """Return the config, validated again."""
        config: ModeConfig = build_config(
            self.descriptor.config_class, self.config, where=f"recorded mode {self.name!r}"
        )
        return config

    def edited(self, model: nn.Module, hook: str) -> ModeRecord:
        """Return the record as ``hook`` (an ``update_for_*`` method) leaves copies of its parts."""
        edit = getattr(self.descriptor, hook)
        if getattr(edit, "__func__", None) is getattr(ModeDescriptor, hook):
            return self
        config, metadata = self.config_object().unsealed(), copy_data(self.metadata)
        edit(model, config, metadata)
        return replace(
            self,
            config=checked_json(config, self.name),
            metadata=checked_metadata(metadata, self.name),
        )


def checked_json(config: ModeConfig, mode: str) -> dict[str, Any]:
    """Return a config as JSON data.

    Raises:
        ApplyModeError: It holds something that JSON cannot.
    """
    data: dict[str, Any] = canonical(
        config.to_json(), f"The config of mode {mode!r}", error=ApplyModeError
    )
    return data


def checked_metadata(metadata: object, mode: str) -> dict[str, Any]:
    """Return metadata as canonical data that shares nothing with the model.

    Raises:
        ApplyModeError: It is no dict, or holds something other than JSON values and tensors.
    """
    if not isinstance(metadata, Mapping):
        raise ApplyModeError(
            f"convert of mode {mode!r} must return a dict of metadata; it returned "
            f"{type(metadata).__name__}.",
            mode=mode,
        )
    data: dict[str, Any] = copy_data(
        canonical(metadata, f"The metadata of mode {mode!r}", error=ApplyModeError)
    )
    return data


@dataclass(frozen=True)
class ModeState:
    """The log: the records of all modes applied to a model, oldest first."""

    records: tuple[ModeRecord, ...] = ()

    def __iter__(self) -> Iterator[ModeRecord]:
        """Iterate over the records, oldest first."""
        return iter(self.records)

    def __len__(self) -> int:
        """Return how many modes were applied."""
        return len(self.records)

    def adding(self, record: ModeRecord) -> ModeState:
        """Return the log with one more record."""
        return ModeState((*self.records, record))

    def replacing_last(self, record: ModeRecord) -> ModeState:
        """Return the log with another last record."""
        return ModeState((*self.records[:-1], record))

    def for_saving(self, model: nn.Module) -> ModeState:
        """Return the log as it is saved: the last record brought up to date, transient ones out."""
        saved = tuple(r for r in self.records if r.descriptor.save_mode_in_state)
        if saved:
            saved = (*saved[:-1], saved[-1].edited(model, "update_for_save"))
        return ModeState(saved)

    def to_dict(self) -> dict[str, Any]:
        """Return the log as plain data that shares nothing with it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "modewright_version": __version__,
            "modes": [
                {"name": r.name, "config": copy_data(r.config), "metadata": copy_data(r.metadata)}
                for r in self.records
            ],
            "provenance": [dict(vars(r.provenance)) for r in self.records],
        }


def state_of(model: nn.Module) -> ModeState | None:
    """Return the log of a root module, or ``None`` if it has none."""
    state = model.__dict__.get(STATE_ATTRIBUTE)
    return state if isinstance(state, ModeState) else None


def set_state(model: nn.Module, state: ModeState | None) -> None:
    """Put a log on a root module, or take it away."""
    if state is None:
        model.__dict__.pop(STATE_ATTRIBUTE, None)
    else:
        model.__dict__[STATE_ATTRIBUTE] = state


def note_fallback(model: nn.Module, mode: str, reason: str) -> None:
    """Note on the last record that its mode was taken in the place of one that failed."""
    state = state_of(model)
    if state:
        last = state.records[-1]
        origin = replace(last.provenance, fallback_for=mode, fallback_reason=reason)
        set_state(model, state.replacing_last(replace(last, provenance=origin)))


def require_state_at_root(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Check that no submodule holds a log.

    Args:
        model: The root module.
        modules: All modules of the model, the root first.

    Raises:
        IncompatibleModeError: One does; the message names it.
    """
    for module in modules[1:]:
        if STATE_ATTRIBUTE in module.__dict__:
            path = next(name for name, m in model.named_modules() if m is module)
            raise IncompatibleModeError(
                f"The submodule {path!r} holds a mode state of its own, but only the root module "
                "may: the parent's state could not be restored. Apply the modes to the whole model "
                f"(rules can target the names under {path!r}), or drop that state with "
                f"remove_mode_state(model.get_submodule({path!r}))."
            )


def parse_state(data: object, registry: ModeRegistry, *, where: str) -> ModeState:
    """Rebuild a log from plain data.

    Args:
        data: What :func:`modewright.mode_state` returned or a checkpoint holds, already migrated.
        registry: Where the modes are looked up.
        where: Name of the data, for messages.

    Raises:
        CheckpointError: The data has another form, or names a mode that is not registered.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("modes"), (list, tuple)):
        raise CheckpointError(
            f"{where} is not a mode state: a dict with the keys schema_version, "
            f"modewright_version and modes (a list) was expected, but received {str(data)[:80]}"
        )
    entries = data["modes"]
    provenance = data.get("provenance")
    if not isinstance(provenance, (list, tuple)) or len(provenance) != len(entries):
        provenance = [{}] * len(entries)
    records = []
    for index, (entry, origin) in enumerate(zip(entries, provenance, strict=True)):
        place = f"{where}, mode {index + 1} of {len(entries)}"
        records.append(_parse_record(entry, origin, registry, place))
    return ModeState(tuple(records))


def _parse_record(entry: object, origin: object, registry: ModeRegistry, where: str) -> ModeRecord:
    if not (
        isinstance(entry, Mapping)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("config"), Mapping)
        and isinstance(entry.get("metadata"), Mapping)
    ):
        raise CheckpointError(
            f"{where}: a record must be a dict with name (str), config (dict) and metadata (dict); "
            f"received {str(entry)[:80]}"
        )
    name, provenance = entry["name"], Provenance.parse(origin)
    if name not in registry:
        owner = provenance.owner
        raise CheckpointError(
            f"{where}: mode {name!r} is not registered here"
            f"{f'; it was recorded by {owner}' if owner else ''}. Install or import the package "
            "that brings it (and register it), then restore again."
        )
    try:
        descriptor = registry[name]
        config = build_config(descriptor.config_class, entry["config"], where=f"mode {name!r}")
    except ModewrightError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return ModeRecord(
        descriptor=descriptor,
        config=canonical(config.to_json(), f"{where}, config", error=CheckpointError),
        metadata=copy_data(
            canonical(entry["metadata"], f"{where}, metadata", error=CheckpointError)
        ),
        provenance=provenance,
    )
