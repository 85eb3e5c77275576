# SPDX-License-Identifier: Apache-2.0
"""Walking a network block by block, and reading what its layers get.

What every technique needs that chooses weights from data: the walk itself (with its precision, and
the folder in which finished blocks are kept), the layers of a block by the input that they share,
and their inputs as the network brings them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from modewright._version import __version__
from modewright.calibration.block_progress import BlockProgress
from modewright.calibration.calls import Call
from modewright.calibration.driver import Block, walk_blocks
from modewright.calibration.precision import Precision, automatic_precision
from modewright.calibration.text import fingerprint
from modewright.calibration.unit_data import Original
from modewright.errors import DataError

Metadata = dict[str, Any]
OnBlock = Callable[[int, "int | None"], None]
L = TypeVar("L", bound=nn.Module)
_SAMPLES = 64  # values of a tensor by which it is recognised


def walk(
    model: nn.Module,
    calibration: object,
    solve: Callable[[Block], Metadata],
    *,
    mode: str,
    as_original: Original,
    settings: Sequence[object],
    precision: Precision,
    keep_original: bool = True,
    on_batch: OnBlock | None = None,
    checkpoint: str | Path | None = None,
) -> dict[str, Metadata]:
    """Run a pass over every block of a model.

    Args:
        model: The model.
        calibration: Batches, or a function that runs the model.
        solve: What is done to one block; returns JSON-like data about it.
        mode: Name of the mode, for messages.
        as_original: A context in which a module computes what it did before the pass.
        settings: All else that decides what the pass does, such as the mode's config.
        precision: Of matrix products while blocks are run.
        keep_original: Whether blocks bring the inputs of the original network too.
        on_batch: Called after each block with how many are done, and how many there are.
        checkpoint: A folder in which finished blocks are kept, to go on after the last one. Only
            for a pass whose whole work on a block is in that block's tensors.

    Returns:
        By block what ``solve`` returned.

    Raises:
        DataError: There is no data.
    """
    if calibration is None:
        raise DataError(
            f"mode {mode!r} needs data that the model is run on: pass "
            "mode_kwargs={'calibration': batches}."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return walk_blocks(
        model,
        calibration,
        solve,
        as_original=as_original,
        keep_original=keep_original,
        running=lambda: automatic_precision(device, precision),
        on_block=on_batch,
        progress=_progress(checkpoint, model, calibration, [mode, precision, *settings]),
    )


def _progress(
    folder: str | Path | None, model: nn.Module, calibration: object, settings: Sequence[object]
) -> BlockProgress | None:
    """Return the finished blocks of this very walk; ``None`` if it cannot be recognised."""
    if folder is None or not isinstance(calibration, Sequence):
        return None
    try:
        digest = sha256(fingerprint(calibration).encode())
    except DataError:  # batches of other things than tensors
        return None
    digest.update(repr([__version__, torch.__version__, *settings]).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        step = max(1, tensor.numel() // _SAMPLES)
        values = None if tensor.is_meta else tensor.detach().reshape(-1)[::step]
        digest.update(f"{name} {tuple(tensor.shape)} {fingerprint([values])};".encode())
    return BlockProgress(Path(folder), digest.hexdigest())


class _Reached(BaseException):
    """Ends a forward pass once the wanted inputs were seen; never leaves this file."""


def by_input(block: Block, layers: Mapping[str, L]) -> list[dict[str, L]]:
    """Return layers of a block by shared input, in the order in which they run.

    A layer that no call reaches is left out.

    Args:
        block: The block.
        layers: Layers in it, by path inside the block.
    """
    order: dict[str, int] = {}
    kept: list[torch.Tensor] = []  # alive, so that no two of them have one address

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and name not in order:
                kept.append(args[0])
                order[name] = id(args[0])

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for call in block.calls:
                if len(order) == len(layers):
                    break
                block.run(call)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int, dict[str, L]] = {}
    for name, key in order.items():
        groups.setdefault(key, {})[name] = layers[name]
    return list(groups.values())


def inputs(
    block: Block, layer: nn.Module, *, original: bool = False, every: int = 1
) -> Iterator[torch.Tensor | None]:
    """Yield for every call of a block the input that one of its layers gets.

    Args:
        block: The block.
        layer: The layer; each call is run up to it.
        original: Take the inputs that the original network has.
        every: Take only every so many calls.

    Yields:
        The first argument; ``None`` for a call that does not reach the layer.
    """
    calls = block.original_calls if original else block.calls
    for call in calls[::every]:
        with block.as_original() if original else nullcontext():  # not while others run the block
            found = _input(block, call, layer)
        yield found


def _input(block: Block, call: Call, layer: nn.Module) -> torch.Tensor | None:
    found: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            block.run(call)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0] if found else None
