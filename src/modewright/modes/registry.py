# SPDX-License-Identifier: Apache-2.0
"""``ModeRegistry``: one table from a mode's name to its descriptor.

A row comes from a table of built-in modes, from ``register(...)``, or from an installed package
that declares the entry point group. Rows are loaded when they are asked for; a broken plug-in is an
error for whoever asks for it, and for nobody else. The registry is checked on first use: a name in
``next_modes``, ``next_prohibited_modes``, ``closes`` or ``export_mode`` that no row bears is an
error, because a rule about a mode that does not exist would never fire.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from modewright.errors import ConfigError, UnknownModeError, did_you_mean
from modewright.modes.config import ModeConfig
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.traits import trait_problem

AnyMode = ModeDescriptor[Any]
T = TypeVar("T", bound="AnyMode | type[AnyMode]")


@dataclass
class _Row:
    """One registered mode: who owns it, and how to get it."""

    owner: str
    load: Callable[[], AnyMode]
    summary: str | None = None
    is_plugin: bool = False
    descriptor: AnyMode | None = None


@dataclass(frozen=True)
class ModeRow:
    """A row of the built-in table: where the descriptor is, and one line of what it does."""

    target: str
    summary: str


class ModeRegistry(Mapping[str, AnyMode]):
    """A table of modes, by name.

    Args:
        modes: The first rows: descriptors or their classes, or a mapping from names to
            :class:`ModeRow`, which are imported when they are asked for.
        entry_point_group: Packages that are installed and declare entry points in this group are
            part of the registry. The entry point's name is the mode's name, its object the
            descriptor or its class.
    """

    def __init__(
        self,
        modes: Mapping[str, ModeRow] | Iterable[AnyMode | type[AnyMode]] = (),
        *,
        entry_point_group: str | None = None,
    ) -> None:
        self._rows: dict[str, _Row] = {}
        self._clashes: dict[str, str] = {}
        self._pending_group: str | None = None
        self._checked = False
        if isinstance(modes, Mapping):
            for name, row in modes.items():
                owner, load = row.target.replace(":", "."), _importer(row.target)
                self._rows[name] = _Row(owner=owner, load=load, summary=row.summary)
        else:
            for mode in modes:
                self.register(mode)
        self._pending_group = entry_point_group  # own modes come before those of plug-ins

    def register(self, mode: T) -> T:
        """Add a mode (a descriptor or its class) and return it: also a class decorator.

        Raises:
            ConfigError: The name is taken (both owners are named), or ``mode`` is no descriptor.
        """
        descriptor = as_descriptor(mode)
        name, owner = descriptor.name, _owner(descriptor)
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"The name of a mode must be a non-empty string; {owner} has {name!r}."
            )
        self._scan()
        if name in self._rows:
            raise ConfigError(
                f"The mode name {name!r} is taken: it belongs to {self._rows[name].owner}, and "
                f"{owner} asks for it too. Choose another name, or remove({name!r}) first."
            )
        self._rows[name] = _Row(owner=owner, load=lambda: descriptor)
        self._checked = False
        return mode

    def remove(self, name: str) -> None:
        """Take a mode out of the registry.

        Raises:
            UnknownModeError: There is no such mode.
        """
        self._find(name)
        del self._rows[name]
        self._clashes.pop(name, None)
        self._checked = False

    def copy(self) -> ModeRegistry:
        """Return a registry with the same rows, to which others can be added."""
        self._scan()
        other = ModeRegistry()
        other._rows = {
            n: _Row(r.owner, r.load, r.summary, r.is_plugin) for n, r in self._rows.items()
        }
        other._clashes = dict(self._clashes)
        return other

    def owner(self, name: str) -> str:
        """Return who brought the mode: the dotted path of its class, or a package."""
        return self._find(name).owner

    def listed_summary(self, name: str) -> str | None:
        """Return one line on the mode; ``None`` if a plug-in would have to be imported for it."""
        row = self._find(name)
        if row.summary is not None or row.is_plugin:
            return row.summary
        return self[name].summary

    def view(self, technique: str) -> dict[str, AnyMode]:
        """Return the modes of one technique ("quantization", "pruning" ...), by name.

        A plug-in that cannot be loaded is in no view; it is an error where it is asked for.
        """
        modes = {}
        for name in self:
            with contextlib.suppress(ConfigError, UnknownModeError):
                modes[name] = self[name]
        return {n: m for n, m in modes.items() if m.technique == technique}

    def is_found_anywhere(self, name: str) -> bool:
        """Whether another process finds the mode too, without registering it by hand."""
        row = self._find(name)
        return row.is_plugin or row.summary is not None

    def loaded(self) -> list[AnyMode]:
        """Return the modes that can be had without importing a plug-in."""
        return [self._load(n, row) for n, row in self._rows.items() if not row.is_plugin]

    def check(self) -> None:
        """Check the rules of every mode that is not a plug-in still unloaded.

        Raises:
            UnknownModeError: A mode's rules name a mode that is not registered.
            ConfigError: A mode's rules contradict each other.
        """
        if self._checked:
            return
        self._scan()
        for name, row in self._rows.items():
            if not row.is_plugin:  # a plug-in is checked when it is loaded
                check_rules(self._load(name, row), self._rows)
        self._checked = True

    def __getitem__(self, name: str) -> AnyMode:
        """Return the descriptor.

        Raises:
            UnknownModeError: No mode has this name; the nearest names are given.
            ConfigError: The plug-in that has it is broken, or two plug-ins claim the name.
        """
        row = self._find(name)
        if name in self._clashes:
            raise ConfigError(
                f"The mode name {name!r} is claimed twice: by {row.owner} and by "
                f"{self._clashes[name]}. Uninstall one of the two."
            )
        return self._load(name, row)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the descriptor, or ``default`` if no mode has this name."""
        return self[name] if name in self else default  # noqa: SIM401 - this is get itself

    def __contains__(self, name: object) -> bool:
        """Whether a mode has this name; imports nothing."""
        self._scan()
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, built-in ones first; imports nothing."""
        self._scan()
        return iter(tuple(self._rows))

    def __len__(self) -> int:
        """Return the number of modes."""
        self._scan()
        return len(self._rows)

    def __repr__(self) -> str:
        """Return the names."""
        return f"ModeRegistry({', '.join(self)})"

    def _find(self, name: str) -> _Row:
        self._scan()
        if name not in self._rows:
            raise UnknownModeError(
                f"There is no mode {name!r}.{did_you_mean(str(name), self._rows)} "
                f"Registered: {', '.join(self._rows) or 'none'}."
            )
        return self._rows[name]

    def _load(self, name: str, row: _Row) -> AnyMode:
        if row.descriptor is None:
            descriptor = row.load()
            if descriptor.name != name:
                raise ConfigError(
                    f"{row.owner} is registered as mode {name!r} but calls itself "
                    f"{descriptor.name!r}. The two names must be the same."
                )
            if row.is_plugin:
                check_rules(descriptor, self._rows)
            if descriptor._registry is None:
                descriptor._registry = self
            row.descriptor = descriptor
        return row.descriptor

    def _scan(self) -> None:
        """Read the entry points' names, once; their objects are not imported."""
        group, self._pending_group = self._pending_group, None
        if group is None:
            return
        for entry in importlib.metadata.entry_points(group=group):
            package = entry.dist.name if entry.dist is not None else entry.module
            owner = f"'{entry.value}' of package {package!r}"
            if entry.name in self._rows:
                self._clashes[entry.name] = owner
            else:
                load = _plugin_loader(entry, owner)
                self._rows[entry.name] = _Row(owner=owner, load=load, is_plugin=True)


def check_rules(mode: AnyMode, names: Iterable[str]) -> None:
    """Check what a descriptor declares, given the names of all modes there are.

    Raises:
        UnknownModeError: A rule names a mode that does not exist.
        ConfigError: A rule contradicts another, a trait is unknown, or the config class is none.
    """
    known = set(names) | {mode.name}
    for member in ("next_modes", "next_prohibited_modes", "closes"):
        for name in sorted(getattr(mode, member) or ()):
            _require_known(mode, member, name, known)
    export = mode.export_mode
    if export is not None:
        _require_known(mode, "export_mode", export, known)
        if mode.next_modes is not None and export not in mode.next_modes:
            raise ConfigError(
                f"Mode {mode.name!r} can never be exported: its export_mode {export!r} is missing "
                "from its next_modes. Add it there."
            )
        if export in (mode.next_prohibited_modes or ()):
            raise ConfigError(f"Mode {mode.name!r} prohibits its own export_mode {export!r}.")
    for member in ("requires", "provides", "removes", "forbids"):
        for trait in getattr(mode, member):
            problem = trait_problem(trait)
            if problem:
                raise ConfigError(f"{member} of mode {mode.name!r}: {problem}")
    if not (inspect.isclass(mode.config_class) and issubclass(mode.config_class, ModeConfig)):
        raise ConfigError(
            f"config_class of mode {mode.name!r} must be a subclass of ModeConfig; it is "
            f"{mode.config_class!r}."
        )


def _require_known(mode: AnyMode, member: str, name: str, known: set[str]) -> None:
    if name not in known:
        raise UnknownModeError(
            f"{member} of mode {mode.name!r} ({_owner(mode)}) names {name!r}, but no registered "
            f"mode bears that name, so the rule could never hold.{did_you_mean(name, known)}"
        )


def as_descriptor(mode: object) -> AnyMode:
    """Return ``mode`` as a descriptor; a class is instantiated without arguments.

    Raises:
        ConfigError: It is neither a descriptor nor a concrete class of one.
    """
    if inspect.isclass(mode) and issubclass(mode, ModeDescriptor):
        missing = sorted(getattr(mode, "__abstractmethods__", ()))
        if missing:
            raise ConfigError(
                f"{mode.__module__}.{mode.__qualname__} is not a complete mode: it does not define "
                f"{', '.join(missing)}."
            )
        return mode()
    if isinstance(mode, ModeDescriptor):
        return mode
    raise ConfigError(
        f"A mode is a ModeDescriptor or a subclass of it; received {mode!r} of type "
        f"{type(mode).__name__}."
    )


def _owner(mode: AnyMode) -> str:
    return f"{type(mode).__module__}.{type(mode).__qualname__}"


def _importer(target: str) -> Callable[[], AnyMode]:
    module, _, attribute = target.partition(":")
    return lambda: as_descriptor(getattr(importlib.import_module(module), attribute))


def _plugin_loader(entry: importlib.metadata.EntryPoint, owner: str) -> Callable[[], AnyMode]:
    def load() -> AnyMode:
        try:
            return as_descriptor(cast(object, entry.load()))
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(sys.exc_info()[2])
            place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
            raise ConfigError(
                f"Mode {entry.name!r} cannot be loaded: the plug-in {owner} failed with "
                f"{type(error).__name__}: {error} (at {place}). Repair or uninstall that package; "
                "all other modes work."
            ) from error

    return load
