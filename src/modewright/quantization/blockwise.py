# SPDX-License-Identifier: Apache-2.0
"""Walking a quantized network block by block, and reading what its layers get.

The passes that choose scales or codes from data all go this way: the block driver brings one block
at a time with its inputs, in the original network and in the quantized one; layers that share an
input are one group, and the groups are solved in the order in which they run, so that each sees
what the ones before it became.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from modewright._version import __version__
from modewright.calibration.block_progress import BlockProgress
from modewright.calibration.calls import Call
from modewright.calibration.driver import Block, walk_blocks
from modewright.calibration.forward import run_batch
from modewright.calibration.text import fingerprint
from modewright.calibration.unit_data import UnitData
from modewright.errors import DataError
from modewright.modes.config import ModeConfig
from modewright.quantization.convert import quantized_layers, quantizers
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.precision import Precision, automatic_precision, usable_precision
from modewright.quantization.quantizer import disabled, quantizers_of

Metadata = dict[str, Any]
OnBlock = Callable[[int, "int | None"], None]
_SAMPLES = 64  # values of a tensor by which it is recognised


@contextmanager
def as_original(module: nn.Module) -> Iterator[None]:
    """Let a quantized module compute what it did before it was quantized."""
    with disabled(quantizers_of(module)):
        yield


def walk(
    model: nn.Module,
    calibration: object,
    solve: Callable[[Block], Metadata],
    *,
    mode: str,
    keep_original: bool = True,
    precision: Precision = "float32",
    on_batch: OnBlock | None = None,
    checkpoint: str | Path | None = None,
    config: ModeConfig | None = None,
) -> dict[str, Metadata]:
    """Run a pass over every block of a quantized model.

    Args:
        model: The model with quantizers.
        calibration: Batches, or a function that runs the model.
        solve: What is done to one block; returns JSON-like data about it.
        mode: Name of the mode, for messages.
        keep_original: Whether blocks bring the inputs of the original network too.
        precision: Of matrix products while blocks are run; see :func:`walking_precision`.
        on_batch: Called after each block with how many are done, and how many there are.
        checkpoint: A folder in which finished blocks are kept, to go on after the last one. Only
            for a pass whose whole work on a block is in that block's tensors.
        config: The mode's config; another one finds nothing in the folder.

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
    chosen = walking_precision(model, calibration, precision)
    return walk_blocks(
        model,
        calibration,
        solve,
        as_original=as_original,
        keep_original=keep_original,
        running=lambda: automatic_precision(device, chosen),
        on_block=on_batch,
        progress=_progress(checkpoint, model, calibration, [mode, chosen, config]),
    )


def _progress(
    folder: str | Path | None, model: nn.Module, calibration: object, settings: list[object]
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
    for name, quantizer in quantizers(model).items():
        digest.update(f"{name} {quantizer.config!r};".encode())
    return BlockProgress(Path(folder), digest.hexdigest())


def walking_precision(
    model: nn.Module,
    calibration: object,
    precision: Precision,
    trial: Callable[[], object] | None = None,
) -> Precision:
    """Return in which precision to run a network that a pass looks at.

    ``"auto"`` is bfloat16 where that is faster and works, if all weights have four bits or less:
    what is lost by rounding them is then far more than what bfloat16 products lose.

    Args:
        model: The network.
        calibration: What it is run on.
        precision: What was asked for.
        trial: Runs the network to see whether bfloat16 works; by default on the first batch.
    """
    if precision != "auto":
        return precision
    unit = calibration if isinstance(calibration, UnitData) else None
    layers = quantized_layers(model if unit is None else unit.network).values()
    coarse = all(q is None or q.config.num_bits <= 4 for q in (y.weight_quantizer for y in layers))
    if not coarse or not (unit or (isinstance(calibration, Sequence) and calibration)):
        return "float32"
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def first_batch() -> None:
        if unit is not None:
            unit.run_once(model)
        else:
            run_batch(model, cast(Sequence[object], calibration)[0])

    return usable_precision(trial or first_batch, device, precision)


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a block that get the same input, by path inside the block."""

    layers: dict[str, QuantizedLayer]

    @property
    def first(self) -> QuantizedLayer:
        """The layer that runs first."""
        return next(iter(self.layers.values()))


class _Reached(BaseException):
    """Ends a forward pass once the wanted inputs were seen; never leaves this file."""


def layer_groups(block: Block) -> list[LayerGroup]:
    """Return the layers with quantized weights by shared input, in the order in which they run."""
    layers = quantized_layers(block.module)
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
                block.run(call)
                if len(order) == len(layers):
                    break
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int, dict[str, QuantizedLayer]] = {}
    for name, key in order.items():
        layer = layers[name]
        if layer.weight_quantizer is None or not layer.has_rows:
            continue
        groups.setdefault(key, {})[name] = layer
    return [LayerGroup(members) for members in groups.values()]


def input_rows(
    block: Block,
    group: LayerGroup,
    *,
    original: bool = False,
    quantized: bool = True,
    every: int = 1,
) -> Iterator[torch.Tensor | None]:
    """Yield for every call the rows ``[n, in]`` that the weights of a group multiply, float32.

    Args:
        block: The block.
        group: Layers with one input.
        original: Take the inputs that the original network has; otherwise those of the quantized
            network.
        every: Take only every so many calls.
        quantized: Pass the inputs of the quantized network through the layer's input quantizer.

    Yields:
        The rows; ``None`` for a call that does not reach the layer, and for a layer whose weight is
        not one matrix that multiplies rows.
    """
    layer = group.first
    calls = block.original_calls if original else block.calls
    context = as_original(block.module) if original else nullcontext()
    with context:
        for call in calls[::every]:
            yield _rows(block, call, layer, quantized)


def _rows(block: Block, call: Call, layer: QuantizedLayer, quantized: bool) -> torch.Tensor | None:
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
    if not found:
        return None
    with torch.no_grad():
        prepare = layer.quantized_input if quantized else layer.transformed_input
        return layer.input_rows(prepare(found[0]))
