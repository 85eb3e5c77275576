# SPDX-License-Identifier: Apache-2.0
"""The block driver: brings a network's blocks one at a time, each with its inputs.

The network is run once on all data to see in which order its blocks run. Then the blocks are
walked: each is visited with the inputs that it gets in the original network and those that it gets
after the blocks before it were converted, and what it puts out becomes the input of the next. So
only one block's activations are in memory, and time grows linearly with depth.

Where a block's input is not what the one before it puts out (between the stages of a convolutional
network, or an encoder and a decoder), a chain ends, and the network is run again for the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import nn

from modewright.calibration.block_progress import BlockProgress
from modewright.calibration.blocks import find_blocks
from modewright.calibration.calls import Call, CallKeeper, first_tensor
from modewright.calibration.forward import evaluating, run_calibration
from modewright.calibration.unit_data import Original, UnitData
from modewright.errors import DataError

Metadata = dict[str, Any]
Running = Callable[[], AbstractContextManager[Any]]
NOT_REACHED = "no calibration data reached this block"


class Block:
    """One block, and all that an algorithm may know of the network around it.

    Attributes:
        name: Its path in the model; empty if the whole model is the block.
        index: Its place, from 0.
        total: How many blocks there are.
        module: The block itself.
        calls: How it is called after the blocks before it were converted.
        original_calls: How it is called in the original network, in the same order.
    """

    def __init__(
        self,
        place: tuple[str, int, int],
        module: nn.Module,
        calls: Sequence[Call],
        original_calls: Sequence[Call],
        as_original: Original,
        running: Running = nullcontext,
    ) -> None:
        self.name, self.index, self.total = place
        self.module, self.calls, self.original_calls = module, calls, original_calls
        self._as_original, self._running = as_original, running
        self._outputs: list[torch.Tensor] | None = None

    def run(self, call: Call) -> torch.Tensor:
        """Return what the block puts out: its hidden state, on the block's device.

        Raises:
            DataError: It puts out no tensor.
        """
        device = next((p.device for p in self.module.parameters()), torch.device("meta"))
        if device.type != "meta":  # there it is brought in by hooks, which bring the inputs too
            call = call.on(device)
        if call.hidden is not None:  # a block may write into its input
            call = call.with_hidden(call.hidden.clone())
        with self._running():
            output = first_tensor(self.module(*call.args, **call.kwargs))
        if output is None:
            raise DataError(f"The block {self.name!r} puts out no tensor.")
        return output

    def as_original(self) -> AbstractContextManager[None]:
        """Return a context in which the block computes what it did before all conversions."""
        return self._as_original(self.module)

    def original_outputs(self) -> Sequence[torch.Tensor]:
        """Return what the original block puts out on the original inputs; computed once."""
        if self._outputs is None:
            with torch.no_grad(), self.as_original():
                self._outputs = [self.run(call) for call in self.original_calls]
        return self._outputs


def walk_blocks(
    model: nn.Module,
    calibration: object,
    visit: Callable[[Block], Metadata],
    *,
    as_original: Original,
    keep_original: bool = True,
    running: Running = nullcontext,
    on_block: Callable[[int, int], None] | None = None,
    progress: BlockProgress | None = None,
) -> dict[str, Metadata]:
    """Visit every block of a network once, in the order in which they run.

    Args:
        model: The network; every train flag is put back afterwards.
        calibration: Batches, or a function that runs the model, as ``run_calibration`` takes them.
            It is gone through once; what the model was called with is kept. Or a
            :class:`UnitData`, if the model is one unit of a network.
        visit: What is done to a block. It may change the block as long as it stays the same module.
        as_original: A context in which a module computes what it did before all conversions.
        keep_original: Follow the original network too; otherwise ``original_calls`` are ``calls``.
        running: A context in which blocks are run, such as one of lower precision.
        on_block: Called after each block with how many are done, and how many there are.
        progress: Keeps what was done; blocks that are in it already are not visited again.

    Returns:
        By block what ``visit`` returned. A block that no data reached is not visited and has
        ``{"": {"skipped": reason}}``.

    Raises:
        DataError: There are no batches, or one has another form; or the converted network does not
            call its blocks as the original one does.
    """
    if isinstance(calibration, UnitData):
        return _visit_unit(model, calibration, visit, as_original, keep_original, running)
    names = find_blocks(model) or ("",)
    found: dict[str, Metadata] = {name: {"": {"skipped": NOT_REACHED}} for name in names}
    with evaluating(model), no_cache(model):
        network = _Network(model, names)
        with as_original(model), running():
            network.survey(calibration)
        walk = _Walk(network, as_original, keep_original, running)
        for index, name in enumerate(network.order):
            block = walk.block(index)
            kept = None if progress is None else progress.load(name, block.module)
            if kept is None:
                found[name] = visit(block)
                if progress is not None:
                    progress.keep(name, block.module, found[name])
            else:
                found[name] = kept
            walk.advance(block)
            if on_block is not None:
                on_block(index + 1, len(network.order))
    return found


def _visit_unit(
    model: nn.Module,
    unit: UnitData,
    visit: Callable[[Block], Metadata],
    as_original: Original,
    keep_original: bool,
    running: Running,
) -> dict[str, Metadata]:
    """Visit the one block that is there, if the unit is a block."""
    if unit.place is None:
        return {}
    place = (unit.place.name, unit.place.index, unit.place.total)
    module = model.get_submodule(unit.place.name)
    with evaluating(model):
        with running():
            calls = unit.calls()
            originals = unit.calls(as_original) if keep_original else calls
        block = Block(place, module, calls, originals, as_original, running)
        found = visit(block)
        with torch.no_grad():
            if keep_original:
                unit.keep([tensor.cpu() for tensor in block.original_outputs()], original=True)
            unit.keep([block.run(call).cpu() for call in block.calls])
    return {unit.place.name: found}


class _Stop(BaseException):
    """Ends a forward pass; never leaves this file."""


class _Output(NamedTuple):
    """What a block put out last, and which of its calls that was."""

    name: str
    number: int
    tensor: torch.Tensor
    version: int | None


class _Network:
    """The model with the data that it is run on, and what is known of how its blocks are called.

    Attributes:
        order: The blocks that data reaches, in the order of their first call.
        follows: Those of them whose input is always what the one before them in ``order`` puts out.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.order: list[str] = []
        self.follows: set[str] = set()
        self._names = names
        self._inputs: list[Call] = []
        self._counts: list[Counter[str]] = []  # for every input how often each block is called
        self._function: object = None

    def survey(self, calibration: object) -> None:
        """Run all data once; note the inputs, and how the blocks are called."""
        if callable(calibration):
            self._function = calibration
        totals: Counter[str] = Counter()
        sources: dict[str, str | None] = {}
        last: list[_Output] = []

        def root(name: str, call: Call) -> None:
            self._inputs.append(call.without_cache())
            self._counts.append(Counter())

        def before(name: str, call: Call) -> None:
            source = next((o.name for o in last if _is_chained(o, name, call, totals)), None)
            if sources.setdefault(name, source) != source:
                sources[name] = None
            totals[name] += 1
            if self._counts:
                self._counts[-1][name] += 1

        def after(name: str, output: Any) -> None:
            tensor = first_tensor(output)
            number = totals[name] - 1
            last[:] = [] if tensor is None else [_Output(name, number, tensor, _version(tensor))]

        with ExitStack() as hooks:
            self._hook(hooks, "", root)
            for name in self._names:
                self._hook(hooks, name, before, after)
            run_calibration(self.model, calibration)
        self.order = list(sources)
        for previous, name in zip(self.order, self.order[1:], strict=False):
            if sources[name] == previous and totals[name] == totals[previous]:
                self.follows.add(name)

    def chain(self, head: str) -> list[str]:
        """Return a block and those after it that get what the one before them puts out."""
        rest = self.order[self.order.index(head) + 1 :]
        return [head, *takewhile(self.follows.__contains__, rest)]

    def record(self, chain: Sequence[str], keeper: CallKeeper) -> dict[str, list[Call]]:
        """Run the network as it is now; return how the blocks of a chain are called.

        Hidden states are kept for the first block alone: those of the others come from the walk.
        """
        if self._inputs and chain[0] == "":
            return {"": list(self._inputs)}
        found: dict[str, list[Call]] = {name: [] for name in chain}
        left = 0

        def before(name: str, call: Call) -> None:
            nonlocal left
            found[name].append(keeper.keep(call, hidden=name == chain[0]))
            left -= 1
            if not left:
                raise _Stop

        with ExitStack() as hooks, torch.no_grad():
            for name in chain:
                self._hook(hooks, name, before)
            if not self._inputs:  # the function runs parts of the model
                run_calibration(self.model, self._function)
            for call, counts in zip(self._inputs, self._counts, strict=True):
                left = sum(counts[name] for name in chain)
                try:
                    if left:
                        self.model(*call.args, **call.kwargs)
                except _Stop:
                    continue
        return found

    def _hook(
        self,
        hooks: ExitStack,
        name: str,
        before: Callable[[str, Call], None],
        after: Callable[[str, Any], None] | None = None,
    ) -> None:
        """Have functions called before and after a module runs, until the hooks are closed."""

        def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before(name, Call(args, kwargs))

        def post(module: nn.Module, args: Any, output: Any) -> None:
            if after is not None:
                after(name, output)

        module = self.model.get_submodule(name)
        hooks.callback(module.register_forward_pre_hook(pre, with_kwargs=True).remove)
        if after is not None:
            hooks.callback(module.register_forward_hook(post).remove)


class _Walk:
    """Both streams of hidden states, from block to block."""

    def __init__(
        self, network: _Network, as_original: Original, keep_original: bool, running: Running
    ) -> None:
        self._network, self._running = network, running
        self._as_original, self._keep_original = as_original, keep_original
        self._calls: dict[str, list[Call]] = {}
        self._original_calls: dict[str, list[Call]] = {}
        self._hidden: list[torch.Tensor] = []
        self._original: list[torch.Tensor] = []

    def block(self, index: int) -> Block:
        """Return the next block with its calls."""
        network = self._network
        name = network.order[index]
        if name not in network.follows:
            self._begin(index)
        calls = _filled(self._calls.pop(name), self._hidden)
        original = calls
        if self._keep_original:
            original = _filled(self._original_calls.pop(name), self._original)
        self._hidden, self._original = [], []
        module = network.model.get_submodule(name)
        place = (name, index, len(network.order))
        return Block(place, module, calls, original, self._as_original, self._running)

    def advance(self, block: Block) -> None:
        """Run a visited block, if the next one gets what it puts out."""
        after = self._network.order[block.index + 1 : block.index + 2]
        if not self._network.follows.issuperset(after) or not after:
            return
        with torch.no_grad():
            if self._keep_original:
                self._original = [tensor.cpu() for tensor in block.original_outputs()]
            self._hidden = [block.run(call).cpu() for call in block.calls]

    def _begin(self, index: int) -> None:
        """Run the network for the chain that begins with a block."""
        order, model = self._network.order, self._network.model
        chain, keeper = self._network.chain(order[index]), CallKeeper()
        with ExitStack() as contexts:
            contexts.enter_context(self._running())
            for name in order[index:]:  # what these put out is not looked at, or not yet
                contexts.enter_context(self._as_original(model.get_submodule(name)))
            self._calls = self._network.record(chain, keeper)
        if not self._keep_original:
            return
        with self._running(), self._as_original(model):
            self._original_calls = self._network.record(chain, keeper)
        for name in chain:
            before, now = len(self._original_calls[name]), len(self._calls[name])
            if before != now:
                raise DataError(
                    f"The block {name!r} is called {before} times by the original network, but "
                    f"{now} times after the blocks before it were converted: calibrate with data "
                    "on which both take the same way."
                )


def _filled(recorded: Sequence[Call], hidden: Sequence[torch.Tensor]) -> list[Call]:
    """Return calls with hidden states; without any, as they were recorded."""
    if not hidden:
        return list(recorded)
    return [call.with_hidden(tensor) for call, tensor in zip(recorded, hidden, strict=True)]


def _is_chained(output: _Output, name: str, call: Call, totals: Counter[str]) -> bool:
    """Whether a call gets what the same call of another block put out, unchanged."""
    hidden = call.hidden
    return (
        hidden is output.tensor
        and output.version == _version(output.tensor)
        and output.name != name
        and output.number == totals[name]
    )


def _version(tensor: torch.Tensor) -> int | None:
    """Return a number that grows when a tensor is written into."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """Keep models of transformers, also inside others, from filling caches of keys and values."""
    owners = [(m, key) for m in model.modules() for key in ("config", "generation_config")]
    configs: list[Any] = [getattr(module, key, None) for module, key in owners]
    switched = {id(c): c for c in configs if getattr(c, "use_cache", None) is True}
    try:
        for config in switched.values():
            config.use_cache = False
        yield
    finally:
        for config in switched.values():
            config.use_cache = True
