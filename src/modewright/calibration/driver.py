# SPDX-License-Identifier: Apache-2.0
"""The block driver: brings a network's blocks one at a time, each with its inputs.

The network is run once on every batch to see how its blocks are called. Then the blocks are walked:
each is visited with the inputs that it gets in the original network and those that it gets after
the blocks before it were converted, and what it puts out becomes the input of the next. So only
one block's activations are in memory, and time grows linearly with depth.

Where a block's input is not the output of the one before it (between the stages of a convolutional
network, or an encoder and a decoder), the network is run again up to that block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from modewright.calibration.block_progress import BlockProgress
from modewright.calibration.blocks import find_blocks
from modewright.calibration.forward import evaluating, run_batch
from modewright.errors import DataError

Metadata = dict[str, Any]
Original = Callable[[nn.Module], AbstractContextManager[None]]
Running = Callable[[], AbstractContextManager[Any]]
NOT_REACHED = "no calibration data reached this block"


@dataclass(frozen=True)
class Call:
    """How a block was called once: positional and keyword arguments, the hidden state in them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor | None:
        """The hidden state: the first floating-point tensor, positional arguments first."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value
        return None

    def with_hidden(self, hidden: torch.Tensor) -> Call:
        """Return the same call with another hidden state."""
        own = self.hidden
        args = tuple(hidden if value is own else value for value in self.args)
        kwargs = {key: hidden if value is own else value for key, value in self.kwargs.items()}
        return Call(args, kwargs)


class Block:
    """One block, and all that an algorithm may know of the network around it.

    Attributes:
        name: Its path in the model; empty if the whole model is the block.
        index: Its place, from 0.
        total: How many blocks there are.
        module: The block itself.
        calls: How it is called after the blocks before it were converted.
        original_calls: How it is called in the original network.
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
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        call = _moved(call, device)
        with self._running():
            output = _first_tensor(self.module(*call.args, **call.kwargs))
        if output is None:
            raise DataError(f"The block {self.name!r} puts out no tensor.")
        return output

    def original_outputs(self) -> Sequence[torch.Tensor]:
        """Return what the original block puts out on the original inputs; computed once."""
        if self._outputs is None:
            with torch.no_grad(), self._as_original(self.module):
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
        DataError: There are no batches, or one has another form.
    """
    names = find_blocks(model) or ("",)
    with evaluating(model), _no_cache(model):
        source = _Source(model, calibration)
        with torch.no_grad(), running():
            seen = source.record(names)
        order = sorted((name for name in names if seen.calls[name]), key=seen.order.index)
        walk = _Walk(model, source, seen, as_original, keep_original, running)
        found: dict[str, Metadata] = {n: {"": {"skipped": NOT_REACHED}} for n in names}
        for index, name in enumerate(order):
            block = walk.block(name, index, len(order))
            kept = None if progress is None else progress.load(name, block.module)
            if kept is None:
                found[name] = visit(block)
                if progress is not None:
                    progress.keep(name, block.module, found[name])
            else:
                found[name] = kept
            walk.advance(block)
            if on_block is not None:
                on_block(index + 1, len(order))
    return found


@dataclass
class _Seen:
    """What one run of the network showed.

    Attributes:
        calls: By block how it was called; hidden states are kept only where a chain begins.
        order: Blocks in the order of their first call.
        follows: By block the one whose output is its input, if there is one.
    """

    calls: dict[str, list[Call]]
    order: list[str]
    follows: dict[str, str]


class _Stop(BaseException):
    """Ends a forward pass; never leaves this file."""


class _Source:
    """Runs the model on calibration data and watches its blocks."""

    def __init__(self, model: nn.Module, calibration: object) -> None:
        self._model = model
        self._calibration: Callable[[nn.Module], object] | Sequence[object]
        if callable(calibration) or isinstance(calibration, Sequence):
            self._calibration = calibration
        elif isinstance(calibration, Iterable):
            self._calibration = list(calibration)
        else:
            raise DataError(
                "calibration must be an iterable of batches or a function that runs the model; "
                f"received {type(calibration).__name__}."
            )

    def record(self, names: Sequence[str]) -> _Seen:
        """Run everything once; return how the blocks are called."""
        seen = _Seen({name: [] for name in names}, [], {})
        known: list[Any] = []
        last: list[tuple[str, torch.Tensor]] = []
        broken: set[str] = set()

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                call = _shared(_without_cache(Call(args, kwargs)), known)
                hidden = call.hidden
                chained = bool(last) and hidden is last[0][1]
                if chained and seen.follows.get(name, last[0][0]) == last[0][0]:
                    seen.follows[name] = last[0][0]
                else:
                    broken.add(name)
                if name not in seen.order:
                    seen.order.append(name)
                if chained and hidden is not None:  # its values come from the walk
                    call = call.with_hidden(hidden.new_empty(0))
                seen.calls[name].append(call)

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tensor = _first_tensor(output)
                last[:] = [] if tensor is None else [(name, tensor)]

            return hook

        with ExitStack() as hooks:
            for name in names:
                module = self._model.get_submodule(name)
                handle = module.register_forward_pre_hook(before(name), with_kwargs=True)
                hooks.callback(handle.remove)
                hooks.callback(module.register_forward_hook(after(name)).remove)
            self._run()
        for name in broken:
            seen.follows.pop(name, None)
        return seen

    def calls_of(self, name: str) -> list[Call]:
        """Run the network as it is now up to a block; return how that is called."""
        found: list[Call] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_without_cache(Call(args, kwargs)))
            if not callable(self._calibration):
                raise _Stop

        module = self._model.get_submodule(name)
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                self._run()
        finally:
            handle.remove()
        return found

    def _run(self) -> None:
        if callable(self._calibration):
            self._calibration(self._model)
            return
        count = 0
        for count, batch in enumerate(self._calibration, start=1):
            try:
                run_batch(self._model, batch, number=count)
            except _Stop:
                continue
        if not count:
            raise DataError(
                "calibration holds no batches. An iterator is empty after its first use; pass a "
                "list."
            )


class _Walk:
    """Both streams of hidden states, from block to block."""

    def __init__(
        self,
        model: nn.Module,
        source: _Source,
        seen: _Seen,
        as_original: Original,
        keep_original: bool,
        running: Running,
    ) -> None:
        self._model, self._source, self._seen = model, source, seen
        self._as_original, self._keep_original = as_original, keep_original
        self._running = running
        self._done: str | None = None
        self._hidden: list[torch.Tensor] = []
        self._original: list[torch.Tensor] = []

    def block(self, name: str, index: int, total: int) -> Block:
        """Return the next block with its calls."""
        recorded = self._seen.calls[name]
        if self._done is not None and self._seen.follows.get(name) == self._done:
            calls = _filled(recorded, self._hidden)
            original = _filled(recorded, self._original) if self._keep_original else calls
        elif index == 0:
            calls = original = recorded
        else:
            with self._running():
                calls = original = self._source.calls_of(name)
            if self._keep_original:
                with self._as_original(self._model), self._running():
                    original = self._source.calls_of(name)
        self._seen.calls[name] = []
        module = self._model.get_submodule(name)
        place = (name, index, total)
        return Block(place, module, calls, original, self._as_original, self._running)

    def advance(self, block: Block) -> None:
        """Run a visited block, so that the next one gets what it puts out."""
        self._done = block.name
        if block.name not in self._seen.follows.values():
            self._hidden, self._original = [], []
            return
        with torch.no_grad():
            if self._keep_original:
                self._original = [tensor.cpu() for tensor in block.original_outputs()]
            self._hidden = [block.run(call).cpu() for call in block.calls]


def _filled(recorded: Sequence[Call], hidden: Sequence[torch.Tensor]) -> list[Call]:
    return [call.with_hidden(tensor) for call, tensor in zip(recorded, hidden, strict=True)]


def _shared(call: Call, known: list[Any]) -> Call:
    """Return a call in which arguments equal to known ones (masks, positions) are the same."""
    hidden = call.hidden

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(item) for item in value)
        if not isinstance(value, torch.Tensor) or value is hidden:
            return value
        for other in known:
            if other is value or (
                other.shape == value.shape
                and other.dtype == value.dtype
                and other.device == value.device
                and torch.equal(other, value)
            ):
                return other
        known.append(value)
        return value

    return Call(
        tuple(one(value) for value in call.args), {k: one(v) for k, v in call.kwargs.items()}
    )


def _without_cache(call: Call) -> Call:
    """Return a call that keeps nothing from one forward pass to the next."""

    def one(value: Any) -> Any:
        stateful = callable(getattr(value, "update", None)) and not isinstance(value, dict)
        return None if stateful and not isinstance(value, nn.Module) else value

    kwargs = {key: one(value) for key, value in call.kwargs.items()}
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    return replace(call, args=tuple(one(value) for value in call.args), kwargs=kwargs)


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Keep a model of transformers from filling a cache of keys and values."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    try:
        if before:
            config.use_cache = False
        yield
    finally:
        if before:
            config.use_cache = before


def _first_tensor(output: Any) -> torch.Tensor | None:
    """Return the hidden state in what a module puts out."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), torch.Tensor):
            found: torch.Tensor = getattr(output, name)
            return found
    items = output.values() if isinstance(output, dict) else output
    if isinstance(output, (tuple, list, dict)):
        return next((tensor for i in items if (tensor := _first_tensor(i)) is not None), None)
    return None


def _moved(call: Call, device: torch.device) -> Call:
    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return tuple(one(item) for item in value) if type(value) is tuple else value

    return Call(tuple(one(v) for v in call.args), {k: one(v) for k, v in call.kwargs.items()})
