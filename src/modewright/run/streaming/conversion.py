# SPDX-License-Identifier: Apache-2.0
"""``Conversion``: one unit after another is read, goes through all modes, and is written.

A unit goes through all steps of the recipe before the next one is read. Where modes look at data,
the hidden states between two blocks are kept for every step by itself (``chains``), so that each
step finds what it would find if it were applied to the whole network after the step before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn

from modewright.calibration.unit_data import Place, UnitData
from modewright.errors import ApplyModeError, ConfigError
from modewright.integrations.shards import Shards
from modewright.modes.apply import apply_mode
from modewright.modes.parts import Part, write_part
from modewright.modes.registry import ModeRegistry
from modewright.modes.state import ModeState, set_state, state_of
from modewright.quantization.config import QuantizeConfig
from modewright.quantization.convert import quantized_layers
from modewright.quantization.planning import plan_layers
from modewright.run.streaming.chains import Chains
from modewright.run.streaming.data import BlockData, FrontData, RestData
from modewright.run.streaming.front import Front, StandIns
from modewright.run.streaming.kept import KeptParts
from modewright.run.streaming.support import Steps
from modewright.run.streaming.units import REST, Units

DataFor = Callable[[int], UnitData]


@dataclass(frozen=True)
class Weights:
    """A model on disk.

    Attributes:
        units: The model without weights, and how it is cut.
        shards: Its weights.
    """

    units: Units
    shards: Shards


@dataclass
class Conversion:
    """The units of a model, converted one after the other.

    Attributes:
        source: What is converted.
        steps: The steps of the recipe.
        network: The model without weights and with its quantizers.
        registry: Where modes are looked up.
        kept: What is finished.
        chains: The hidden states between two blocks.
        folder: Where the result is written.
        batches: What modes look at; ``None`` if none of them needs data.
    """

    source: Weights
    steps: Steps
    network: nn.Module
    registry: ModeRegistry
    kept: KeptParts
    chains: Chains
    folder: Path
    batches: Sequence[object] | None
    _front: Front | None = field(default=None, init=False)
    _last_with_data: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self._last_with_data = self.steps.last_with_data(self.network)

    def convert_all(self, on_unit: Callable[[int, int], None]) -> list[Part]:
        """Convert what an earlier run did not finish; return all parts in order.

        Args:
            on_unit: Called after each unit with how many are done, and how many there are.

        Raises:
            ApplyModeError: A mode failed.
            DataError: The data cannot be run through the model unit by unit.
            CheckpointError: A file is damaged or cannot be written.
        """
        names = self.source.units.names
        known = [self.kept.load(index) for index in range(len(names))]
        if self.batches is not None:
            known = self._gone_on_from(known)
        parts = []
        for index, name in enumerate(names):
            part = known[index]
            if part is None:
                part = self._convert(index, name, len(names))
                self.kept.keep(index, part)
                self.chains.forget(index)  # what went into it
            parts.append(part)
            on_unit(index + 1, len(names))
        return parts

    def _gone_on_from(self, known: Sequence[Part | None]) -> list[Part | None]:
        """Return the finished parts that data need not be run through again, and open the next."""
        finished = len(list(takewhile(lambda part: part is not None, known)))
        if finished and finished < len(known) and not self.chains.load(finished):
            finished = 0
        if finished < len(self.source.units.blocks):
            self._front = self._opened()
        return [*known[:finished], *[None] * (len(known) - finished)]

    def _opened(self) -> Front:
        """Read the rest of the model, for what of it runs before the blocks."""
        rest = self.source.units.shell(REST)
        stands = StandIns(rest, self.source.units.skeleton, self.source.units.blocks)
        self.source.units.fill(rest, self.source.shards)
        return Front(stands, self.batches or ())

    def _convert(self, index: int, name: str, total: int) -> Part:
        """Read, convert and write one unit."""
        shell = self.source.units.shell(name)
        config = QuantizeConfig.model_validate(self.steps.for_shell()[0][1])
        touched = bool(plan_layers(shell, config).schemes)
        self.source.units.fill(shell, self.source.shards)
        if self.batches is not None and name != REST:
            self._convert_block(shell, Place(name, index, total - 1), touched=touched)
        elif touched:
            self._convert_rest(shell, name)
        if touched:
            set_state(shell, self.steps.as_recorded(state_of(shell) or ModeState()))
        return write_part(
            self.folder, f"modewright-{index + 1:05}-of-{total:05}.safetensors", shell
        )

    def _convert_block(self, shell: nn.Module, place: Place, *, touched: bool) -> None:
        """Convert a block with data; one without quantized layers passes data on, no more."""
        steps = range(len(self.steps.modes) if touched else self._last_with_data + 1)
        for step in steps:
            data = BlockData(self.network, place, step, self.chains, self._front)
            self._apply(shell, step, place.name, data)
            self._go_on_before_blocks(step)
        if not touched:
            set_state(shell, None)
        self.chains.advance(place.index + 1, place.name)
        self._front = None

    def _convert_rest(self, shell: nn.Module, name: str) -> None:
        """Convert the rest, or a block of a recipe that needs no data."""
        stands = None
        if self.batches is not None:
            stands = StandIns(shell, self.source.units.skeleton, self.source.units.blocks)
            stands.find_form(self.batches[0])
        for step in range(len(self.steps.modes)):
            data = None
            if stands is not None and self.batches is not None:
                data = RestData(self.network, step, self.chains, stands, self.batches)
            self._apply(shell, step, name, data)

    def _go_on_before_blocks(self, step: int) -> None:
        """Apply a step to the modules before the blocks, so that the next one finds it applied."""
        if self._front is None or step >= self._last_with_data:
            return
        module = self._front.module
        if step == 0 or quantized_layers(module):
            self._apply(module, step, "before the blocks", FrontData(self.network, self._front))
        if step == 0 and quantized_layers(module):
            self.steps.require_early_scales(self.network)

    def _apply(self, module: nn.Module, step: int, where: str, data: UnitData | None) -> None:
        """Apply one step of the recipe to a unit."""
        mode, config = self.steps.for_shell()[step]
        kwargs: dict[str, Any] = {}
        if data is not None and self.registry[mode].uses_calibration:
            kwargs = {"calibration": data}
        try:
            converted = apply_mode(
                module, (mode, config), registry=self.registry, mode_kwargs=kwargs, atomic=False
            )
        except ApplyModeError as error:
            raise ApplyModeError(f"{where}: {error}", mode=error.mode, index=step) from error
        if converted is not module:
            raise ConfigError(
                f"mode {mode!r} puts another module in the place of the one it is given, which "
                "cannot be done unit by unit. Leave streaming out."
            )
