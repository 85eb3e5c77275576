# SPDX-License-Identifier: Apache-2.0
"""How a sequence of modes is applied to a model, and how a recorded one is restored.

Everything that can be known beforehand is checked first: names, configs, the order of the whole
sequence. Then each mode converts in turn, and is recorded. If one fails, or the user interrupts,
the model is put back as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from modewright.errors import ApplyModeError, ConfigError, IncompatibleModeError
from modewright.modes.codec import copy_data
from modewright.modes.config import ModeConfig
from modewright.modes.descriptor import ModeDescriptor
from modewright.modes.model_like import ModelLike, all_modules, as_model, rewrapped, unwrap
from modewright.modes.registry import ModeRegistry
from modewright.modes.sequence import Position, check_restorable, check_sequence
from modewright.modes.snapshot import Snapshot
from modewright.modes.state import (
    ModeRecord,
    ModeState,
    Provenance,
    checked_json,
    checked_metadata,
    require_state_at_root,
    set_state,
    state_of,
)
from modewright.modes.steps import ModeKwargs, Modes, Step, resolve_steps

_REDUCING = nn.parallel.DistributedDataParallel


def apply_mode(
    model: object,
    mode: Modes,
    *,
    registry: ModeRegistry,
    mode_kwargs: ModeKwargs = None,
    init_state: bool | None = None,
    atomic: bool = True,
) -> nn.Module:
    """Apply one mode or several; see :func:`modewright.apply_mode`."""
    steps = resolve_steps(mode, mode_kwargs, registry)
    root = as_model(model)
    holder = None
    if isinstance(root, nn.Module):
        root, holder = unwrap(root)
    modules = all_modules(root) if isinstance(root, nn.Module) else []
    state = _initial_state(root, modules, init_state)
    position = Position.after_all(record.descriptor for record in state)
    modes = [step.mode for step in steps]
    check_sequence(position, modes, registry)
    check_restorable([*position.history, *modes])
    check_model_like(root, modes)
    if steps and isinstance(root, nn.Module):
        steps[0].mode.preview(root, steps[0].config)  # finds patterns that match nothing
    if not steps:
        built = root.build() if isinstance(root, ModelLike) else root
        return rewrapped(holder, built)
    reduced = list(holder.parameters()) if isinstance(holder, _REDUCING) else []
    converted = _Run(root, modules, state, len(steps), atomic).apply(steps)
    _warn_of_stale_reduction(reduced, converted)
    return rewrapped(holder, converted)


def restore_records(
    root: nn.Module | ModelLike, state: ModeState, *, atomic: bool = True
) -> nn.Module:
    """Replay the ``restore`` of every record on an unmodified model, and give it the state.

    Raises:
        ApplyModeError: A ``restore`` failed; the model is as it was.
        IncompatibleModeError: The records are in an order that no run could have produced, or the
            model already has a state.
    """
    if isinstance(root, nn.Module) and state_of(root) is not None:
        raise IncompatibleModeError(
            "The model already has a mode state "
            f"({', '.join(r.name for r in state_of(root) or ())}): restoring needs the unmodified "
            "model. Build it anew."
        )
    modules = all_modules(root) if isinstance(root, nn.Module) else []
    _initial_state(root, modules, init_state=True)
    modes = [record.descriptor for record in state]
    check_sequence(Position(), modes)
    check_model_like(root, modes)
    return _Run(root, modules, ModeState(), len(state), atomic).restore(state)


@dataclass
class _Run:
    """One call: the model as it goes from mode to mode, and its growing log."""

    root: nn.Module | ModelLike
    modules: list[nn.Module]
    state: ModeState
    total: int
    atomic: bool

    def apply(self, steps: list[Step]) -> nn.Module:
        values = any(step.mode.writes_in_place for step in steps)
        with self._undo(values) as undo:
            for index, step in enumerate(steps):
                undo.at(step.mode.name, index)
                self._prepare(step.mode.require_model_like)
                self._update_last()
                self._convert(step)
            return self._finished()

    def restore(self, state: ModeState) -> nn.Module:
        values = any(record.descriptor.writes_in_place for record in state)
        with self._undo(values, verb="restored") as undo:
            for index, record in enumerate(state):
                undo.at(record.name, index)
                self._prepare(record.descriptor.require_model_like)
                with _seeded(torch.initial_seed()):  # a new module draws weights to be replaced
                    restored = record.descriptor.restore(
                        self._input, record.config_object(), copy_data(record.metadata)
                    )
                self._take(restored, "restore")
                self.state = self.state.adding(record)
            return self._finished()

    def _convert(self, step: Step) -> None:
        asked = checked_json(step.config, step.mode.name)
        seed = (torch.initial_seed() + len(self.state)) % 2**63  # another one for every mode
        with _seeded(seed):
            result = step.mode.convert(self._input, step.config, **step.kwargs)
        converted, config, metadata = _parts(result, step)
        self._take(converted, "convert")
        record = ModeRecord(
            descriptor=step.mode,
            config=asked if config is step.config else checked_json(config, step.mode.name),
            metadata=checked_metadata(metadata, step.mode.name),
            provenance=Provenance(
                seed=seed, owner=f"{type(step.mode).__module__}.{type(step.mode).__qualname__}"
            ),
        )
        self.state = self.state.adding(record)
        if isinstance(self.root, nn.Module):
            set_state(self.root, self.state)

    @property
    def _input(self) -> Any:
        """What an entry point gets: the module, or the recipe for a mode that asked for it."""
        return self.root

    def _take(self, model: object, entry_point: str) -> None:
        """Go on with the model that an entry point returned."""
        if model is None:
            raise ApplyModeError(f"{entry_point} returned None in place of the model: it failed.")
        if not isinstance(model, (nn.Module, ModelLike)):
            raise ApplyModeError(
                f"{entry_point} must return the model (a torch.nn.Module); it returned "
                f"{type(model).__name__}."
            )
        if model is not self.root and isinstance(self.root, nn.Module):
            set_state(self.root, None)
        self.root = model

    def _prepare(self, wants_model_like: bool) -> None:
        if isinstance(self.root, ModelLike) and not wants_model_like:
            self.root = self.root.build()

    def _update_last(self) -> None:
        if len(self.state) and isinstance(self.root, nn.Module):
            last = self.state.records[-1]
            self.state = self.state.replacing_last(last.edited(self.root, "update_for_new_mode"))

    def _finished(self) -> nn.Module:
        self._prepare(wants_model_like=False)
        if not isinstance(self.root, nn.Module):
            raise ApplyModeError("the model could not be built.")
        require_state_at_root(self.root, all_modules(self.root))
        set_state(self.root, self.state if len(self.state) else None)
        return self.root

    def _undo(self, values: bool, verb: str = "applied") -> _Undo:
        snapshot = Snapshot(self.modules, values=values, enabled=self.atomic and bool(self.modules))
        return _Undo(snapshot, total=self.total, verb=verb)


class _Undo:
    """Rolls the model back when the body raises, and says which mode was at work.

    An ``Exception`` leaves as :class:`ApplyModeError` from that exception; an interrupt leaves as
    it is.
    """

    def __init__(self, snapshot: Snapshot, *, total: int, verb: str) -> None:
        self._snapshot = snapshot
        self._mode, self._index = "", 0
        self._total, self._verb = total, verb

    def at(self, mode: str, index: int) -> None:
        """Note which mode is at work now."""
        self._mode, self._index = mode, index

    def __enter__(self) -> _Undo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        outcome = self._roll_back()
        if isinstance(error, Exception):
            place = f" (step {self._index + 1} of {self._total})" if self._total > 1 else ""
            detail = str(error) or "no message"
            kind_name = "" if type(error) is ApplyModeError else f"{type(error).__name__}: "
            raise ApplyModeError(
                f"Mode {self._mode!r}{place} could not be {self._verb}: {kind_name}{detail} "
                f"{outcome}",
                mode=self._mode,
                index=self._index,
            ) from error

    def _roll_back(self) -> str:
        """Put the model back; return the sentence that says how far that worked."""
        snapshot = self._snapshot
        if not snapshot.enabled:
            return "The model may be half converted (atomic=False)." if snapshot.modules else ""
        snapshot.roll_back()
        written = snapshot.written_in_place()
        if not written:
            return "The model is as it was."
        names = f"{', '.join(written[:5])}{' ...' if len(written) > 5 else ''}"
        return (
            f"The model is as it was, except for the values of {names}: the mode declares "
            "writes_in_place = False but wrote into them."
        )


def _warn_of_stale_reduction(reduced: list[nn.Parameter], converted: nn.Module) -> None:
    """Say so if gradients of new parameters would not be averaged over processes."""
    known = {id(parameter) for parameter in reduced}
    if known and any(id(parameter) not in known for parameter in converted.parameters()):
        warnings.warn(
            "The modes replaced parameters of a model in DistributedDataParallel, which averages "
            "the gradients of those it was made with. Before training on, wrap it anew: "
            "DistributedDataParallel(model.module).",
            stacklevel=4,
        )


def _initial_state(
    root: nn.Module | ModelLike, modules: list[nn.Module], init_state: bool | None
) -> ModeState:
    state = None
    if isinstance(root, nn.Module):
        require_state_at_root(root, modules)
        state = state_of(root)
    if init_state is True and state is not None:
        raise IncompatibleModeError(
            "init_state=True asks for a model without a mode state, but modes were applied to this "
            f"one: {', '.join(r.name for r in state)}. Leave init_state out to go on from there."
        )
    if init_state is False and state is None:
        raise IncompatibleModeError(
            "init_state=False asks for a model with a mode state, but no mode was applied to this "
            "one. Leave init_state out to start."
        )
    return state or ModeState()


def check_model_like(root: nn.Module | ModelLike, modes: Sequence[ModeDescriptor[Any]]) -> None:
    """Check that a mode that wants the model's recipe gets it.

    Raises:
        IncompatibleModeError: The model is built by then.
    """
    for index, mode in enumerate(modes):
        if mode.require_model_like and (index > 0 or isinstance(root, nn.Module)):
            raise IncompatibleModeError(
                f"Mode {mode.name!r} must be the first one and needs the recipe of the model "
                "instead of a built one: pass (class, args, kwargs)."
            )


def _parts(result: object, step: Step) -> tuple[object, ModeConfig, object]:
    """Split what convert returned into model, config and metadata."""
    if result is None:
        raise ApplyModeError("convert returned None: it failed.")
    if isinstance(result, tuple) and len(result) == 2:
        return result[0], step.config, result[1]
    if isinstance(result, tuple) and len(result) == 3:
        if not isinstance(result[1], step.mode.config_class):
            raise ConfigError(
                f"convert returned a config of type {type(result[1]).__name__}; "
                f"{step.mode.config_class.__name__} was expected."
            )
        return result[0], result[1], result[2]
    raise ApplyModeError(
        "convert must return (model, metadata) or (model, config, metadata); it returned "
        f"{type(result).__name__}."
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Start torch's random numbers from ``seed``, and go on afterwards as if nothing was drawn."""
    devices: Any = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield
