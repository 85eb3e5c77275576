# SPDX-License-Identifier: Apache-2.0
"""Walking a quantized network block by block, and reading what its layers get.

The passes that choose scales or codes from data all go this way: the block driver brings one block
at a time with its inputs, in the original network and in the quantized one; layers that share an
input are one group, and the groups are solved in the order in which they run, so that each sees
what the ones before it became.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from modewright.calibration import blockwise
from modewright.calibration.blockwise import OnBlock
from modewright.calibration.driver import Block
from modewright.calibration.forward import run_batch
from modewright.calibration.precision import Precision, usable_precision
from modewright.calibration.unit_data import UnitData
from modewright.modes.config import ModeConfig
from modewright.quantization.convert import quantized_layers, quantizers
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.quantizer import disabled, quantizers_of

__all__ = [
    "LayerGroup",
    "OnBlock",
    "as_original",
    "exact_activations",
    "input_rows",
    "layer_groups",
    "walk",
    "walking_precision",
]

Metadata = dict[str, Any]


@contextmanager
def as_original(module: nn.Module) -> Iterator[None]:
    """Let a quantized module compute what it did before it was quantized."""
    with disabled(quantizers_of(module)):
        yield


@contextmanager
def exact_activations(module: nn.Module) -> Iterator[None]:
    """Let activations of a quantized module pass as they are, and its weights be quantized."""
    layers = quantized_layers(module).values()
    with disabled([q for layer in layers for q in layer.activation_quantizers().values()]):
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
    schemes = [f"{name} {q.config!r}" for name, q in quantizers(model).items()]
    return blockwise.walk(
        model,
        calibration,
        solve,
        mode=mode,
        as_original=as_original,
        settings=[config, schemes],
        precision=walking_precision(model, calibration, precision),
        keep_original=keep_original,
        on_batch=on_batch,
        checkpoint=checkpoint,
    )


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


def layer_groups(block: Block) -> list[LayerGroup]:
    """Return the layers with quantized weights by shared input, in the order in which they run."""
    layers = {
        name: layer
        for name, layer in quantized_layers(block.module).items()
        if layer.weight_quantizer is not None and layer.has_rows
    }
    return [LayerGroup(members) for members in blockwise.by_input(block, layers)]


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
    prepare = layer.quantized_input if quantized else layer.transformed_input
    for found in blockwise.inputs(block, layer, original=original, every=every):
        with torch.no_grad():
            rows = None if found is None else layer.input_rows(prepare(found))
        yield rows
