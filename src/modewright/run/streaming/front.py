# SPDX-License-Identifier: Apache-2.0
"""What of a network runs before its blocks, and stand-ins for the blocks that are not in memory.

Data is run through the rest of a network, in which stand-ins note how each block is called: with
which masks, positions and, for the first one, which hidden state. The rest of a model's code is run
as it is; nothing of an architecture is known here but that each block gets what the one before it
puts out, which is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from modewright.calibration.calls import Call, CallKeeper
from modewright.calibration.driver import no_cache
from modewright.calibration.forward import evaluating, run_batch
from modewright.calibration.unit_data import Original
from modewright.errors import DataError

Frames = dict[str, list[Call]]
Passing = Callable[[int, Call], torch.Tensor]


class StandIn(nn.Module):
    """Stands where a block belongs; all else that it is asked, the block without weights answers.

    Args:
        number: Which block it is.
        block: The block, without weights.
        stands: What all stand-ins share.
    """

    def __init__(self, number: int, block: nn.Module, stands: StandIns) -> None:
        super().__init__()
        self.__dict__.update(_number=number, _block=block, _stands=stands)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call, and put out a hidden state in the form in which blocks do."""
        stands: StandIns = self.__dict__["_stands"]
        hidden = stands.passing(self.__dict__["_number"], Call(args, kwargs))
        return (hidden,) if stands.in_tuples else hidden


class _Stop(BaseException):
    """Ends a forward pass; never leaves this file."""


class _NotChained(BaseException):
    """Ends a forward pass in which a block got something else; never leaves this file."""


class StandIns:
    """The stand-ins in the rest of a network, and what runs through them.

    Args:
        rest: The rest of a network; its blocks are replaced.
        skeleton: The network without weights.
        blocks: The paths of its blocks, in order.

    Attributes:
        in_tuples: Whether blocks put out a tuple that holds the hidden state.
        passing: What happens when a block is called: returns its hidden state.
    """

    def __init__(self, rest: nn.Module, skeleton: nn.Module, blocks: Sequence[str]) -> None:
        self.rest, self.blocks = rest, tuple(blocks)
        self.in_tuples = False
        self.passing: Passing = _unused
        for number, path in enumerate(blocks):
            parent, _, name = path.rpartition(".")
            stand_in = StandIn(number, skeleton.get_submodule(path), self)
            rest.get_submodule(parent)._modules[name] = stand_in

    def record(self, batches: Sequence[object]) -> Frames:
        """Run batches up to the last block; return how each block is called.

        Only the calls of the first one hold a hidden state.

        Raises:
            DataError: A block is not called once for each batch, in order, with what the one before
                it puts out.
        """
        found: Frames = {name: [] for name in self.blocks}
        keeper = CallKeeper()
        hidden: list[torch.Tensor] = []

        def passing(number: int, call: Call) -> torch.Tensor:
            own = call.hidden
            chained = number == len(hidden) and (not hidden or own is hidden[-1])
            if own is None or not chained:
                raise _NotChained
            found[self.blocks[number]].append(keeper.keep(call, hidden=not number))
            if number + 1 == len(self.blocks):
                raise _Stop
            hidden.append(own.clone())
            return hidden[-1]

        for batch in batches:
            hidden.clear()
            if not self._stopped(batch, passing):
                raise DataError(_unchained(self.rest))
        return found

    def replay(self, batches: Sequence[object], outputs: Sequence[torch.Tensor]) -> int:
        """Run batches through the rest, as if the last block had put out ``outputs``."""
        last = len(self.blocks) - 1
        for batch, output in zip(batches, outputs, strict=True):

            def passing(number: int, call: Call, output: torch.Tensor = output) -> torch.Tensor:
                own = call.hidden
                return output.clone() if number == last or own is None else own

            with self._passing(passing):
                run_batch(self.rest, batch)
        return len(batches)

    def find_form(self, batch: object) -> None:
        """Find out in which form blocks put out their hidden state, by trying both.

        Raises:
            DataError: In neither do the blocks follow one another.
        """
        problem: Exception | None = None
        for self.in_tuples in (False, True):
            try:
                self.record([batch])
            except (DataError, TypeError, LookupError, AttributeError, RuntimeError) as error:
                problem = problem or error
            else:
                return
        raise DataError(f"{_unchained(self.rest)} ({problem})") from problem

    def _stopped(self, batch: object, passing: Passing) -> bool:
        """Run a batch up to the last block; whether every block got what the last one put out."""
        try:
            with self._passing(passing):
                run_batch(self.rest, batch)
        except _Stop:
            return True
        except _NotChained:
            return False
        return False

    @contextmanager
    def _passing(self, passing: Passing) -> Iterator[None]:
        self.passing = passing
        try:
            with torch.no_grad(), evaluating(self.rest), no_cache(self.rest):
                yield
        finally:
            self.passing = _unused


class Front:
    """The modules that run before the blocks, with the calls of the blocks that they lead to.

    Args:
        stands: The rest of the network with its weights; what does not run before the blocks is
            taken out.
        batches: The data.

    Attributes:
        module: The modules, under their own paths.

    Raises:
        DataError: The blocks do not follow one another.
    """

    def __init__(self, stands: StandIns, batches: Sequence[object]) -> None:
        self.module = stands.rest
        self._stands, self._batches = stands, batches
        ran: set[nn.Module] = set()
        hooks = [
            module.register_forward_pre_hook(lambda module, args: ran.add(module))
            for module in stands.rest.modules()
        ]
        try:
            stands.find_form(batches[0])
        finally:
            for hook in hooks:
                hook.remove()
        _prune(stands.rest, ran)

    def calls(self, as_original: Original | None = None, *, once: bool = False) -> Frames:
        """Return how each block is called, by the modules as they are now or once were.

        Args:
            as_original: A context in which a module computes what it did before all conversions.
            once: Only for the first batch.
        """
        with nullcontext() if as_original is None else as_original(self.module):
            return self._stands.record(self._batches[:1] if once else self._batches)


def _prune(module: nn.Module, ran: set[nn.Module]) -> None:
    """Take out all that did not run."""
    for name, child in list(module.named_children()):
        if any(part in ran for part in child.modules()):
            _prune(child, ran)
        elif any(True for _ in child.parameters()):
            module._modules[name] = nn.Identity()


def _unused(number: int, call: Call) -> torch.Tensor:
    raise DataError("A block was called outside of a run of data.")


def _unchained(rest: nn.Module) -> str:
    return (
        f"The blocks of {type(rest).__name__} cannot be streamed with data: each has to be called "
        "once for every batch, and to get what the one before it puts out. Optimize without "
        "streaming, or by a recipe that looks at no data."
    )
