# SPDX-License-Identifier: Apache-2.0
"""What a pass gets of the data when it goes over a unit: a block, the front, or the rest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from modewright.calibration.calls import Call, first_tensor
from modewright.calibration.unit_data import Original, Place, UnitData
from modewright.errors import DataError
from modewright.run.streaming.chains import Chains
from modewright.run.streaming.front import Frames, Front, StandIns


class BlockData(UnitData):
    """The data of one block, for one step of the recipe.

    Args:
        network: The whole network without weights.
        place: Which block it is.
        step: The number of the step.
        chains: The hidden states.
        front: What leads to the first block; ``None`` once it has been run for every chain.
    """

    place: Place

    def __init__(
        self, network: nn.Module, place: Place, step: int, chains: Chains, front: Front | None
    ) -> None:
        self.network, self.place = network, place
        self._step, self._chains, self._front = step, chains, front
        self._runs = 0

    def run(self, model: nn.Module) -> int:
        """Run the block on all calls of the next chain; a run that fails is none."""
        key = _key(self._step, self._runs)
        calls = self._chains.calls(key, self.place.name, self._first)
        self._chains.keep(key, [self._output(model, call).cpu() for call in calls])
        self._runs += 1
        return len(calls)

    def run_once(self, model: nn.Module) -> None:
        """Run the block on the first call of the next chain."""
        key, first = _key(self._step, self._runs), partial(self._first, once=True)
        self._output(model, self._chains.sample(key, self.place.name, first))

    def calls(self, as_original: Original | None = None) -> list[Call]:
        """Return the calls of the next chain, or those beside the last one in the original."""
        if as_original is None:
            self._runs += 1
        key = _key(self._step, self._runs - 1, original=as_original is not None)
        return self._chains.calls(key, self.place.name, partial(self._first, as_original))

    def keep(self, outputs: Sequence[torch.Tensor], *, original: bool = False) -> None:
        """Keep the outputs, in the chain that was asked for last."""
        self._chains.keep(_key(self._step, self._runs - 1, original=original), outputs)

    def _first(self, as_original: Original | None = None, *, once: bool = False) -> Frames:
        if self._front is None:
            raise DataError(
                f"{self.place.name!r} runs data in another way than the blocks before it did, so "
                "the model cannot be streamed by a recipe that looks at data."
            )
        return self._front.calls(as_original, once=once)

    def _output(self, model: nn.Module, call: Call) -> torch.Tensor:
        if call.hidden is not None:  # a block may write into its input
            call = call.with_hidden(call.hidden.clone())
        output = first_tensor(model.get_submodule(self.place.name)(*call.args, **call.kwargs))
        if output is None:
            raise DataError(f"The block {self.place.name!r} puts out no tensor.")
        return output


class FrontData(UnitData):
    """The data of the modules before the blocks: it is run up to the last block.

    Args:
        network: The whole network without weights.
        front: The modules.
    """

    place = None

    def __init__(self, network: nn.Module, front: Front) -> None:
        self.network, self._front = network, front

    def run(self, model: nn.Module) -> int:
        """Run all batches up to the last block."""
        return len(next(iter(self._front.calls().values())))

    def run_once(self, model: nn.Module) -> None:
        """Run the first batch up to the last block."""
        self._front.calls(once=True)

    def calls(self, as_original: Original | None = None) -> list[Call]:
        """Return nothing: there is no block."""
        return []

    def keep(self, outputs: Sequence[torch.Tensor], *, original: bool = False) -> None:
        """Keep nothing."""


class RestData(UnitData):
    """The data of all that lies around the blocks, for one step of the recipe.

    Args:
        network: The whole network without weights.
        step: The number of the step.
        chains: The hidden states that the last block put out.
        stands: The rest of the network, with stand-ins for its blocks.
        batches: The data.
    """

    place = None

    def __init__(
        self,
        network: nn.Module,
        step: int,
        chains: Chains,
        stands: StandIns,
        batches: Sequence[object],
    ) -> None:
        self.network = network
        self._step, self._chains, self._stands, self._batches = step, chains, stands, batches
        self._runs = 0

    def run(self, model: nn.Module) -> int:
        """Run all batches, with what the last block put out in the next chain."""
        outputs = self._chains.hidden(_key(self._step, self._runs))
        count = self._stands.replay(self._batches, outputs)
        self._runs += 1
        return count

    def run_once(self, model: nn.Module) -> None:
        """Run the first batch."""
        outputs = self._chains.hidden(_key(self._step, self._runs))
        self._stands.replay(self._batches[:1], outputs[:1])

    def calls(self, as_original: Original | None = None) -> list[Call]:
        """Return nothing: there is no block."""
        return []

    def keep(self, outputs: Sequence[torch.Tensor], *, original: bool = False) -> None:
        """Keep nothing."""


def _key(step: int, run: int, *, original: bool = False) -> str:
    """Return the name of a chain: the number of the step, of its run of data, and which network."""
    return f"{step}-{run}{'-original' if original else ''}"
