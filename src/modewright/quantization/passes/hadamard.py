# SPDX-License-Identifier: Apache-2.0
"""Mode ``hadamard``: rotate the inputs of layers in blocks, so that outliers spread out.

The rotation is done when the layer runs, and undone by its weight, which is rotated once. Within a
group that shares a scale all values then have about the same size. (Ashkboos et al. 2024, *QuaRot*,
for online rotations; Egiazarian et al. 2025, *Bridging the Gap Between Promise and Performance for
Microscaling FP4 Quantization*, for blocks of the size of a group.)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from modewright.formats.hadamard import rotate_last
from modewright.matching import require_matches
from modewright.quantization.blockwise import OnBlock
from modewright.quantization.config import HadamardConfig
from modewright.quantization.convert import quantized_layers
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.passes.records import finish, set_max_scale

Metadata = dict[str, Any]
NO_INPUT_QUANTIZER = "its input is not quantized; weights_too: true rotates it all the same"
NO_BLOCK = "its input features are not a multiple of the block"
TAKES_NONE = "its input cannot be rotated"
ROTATED = "its input is rotated already"
_LARGEST = 128  # of the blocks that are chosen here: a larger rotation costs more than it brings


def convert(
    model: nn.Module,
    config: HadamardConfig,
    *,
    calibration: object = None,
    on_batch: OnBlock | None = None,
) -> tuple[nn.Module, Metadata]:
    """Rotate; data is not needed.

    Raises:
        MatchError: A pattern matches no module.
    """
    modules = dict(model.named_modules())
    wanted = set(modules)
    if config.targets is not None:
        wanted = set(require_matches(modules, config.targets, "`targets` of mode 'hadamard'").names)
    if config.ignore:
        wanted -= require_matches(modules, config.ignore, "`ignore` of mode 'hadamard'").names
    found: Metadata = {}
    for name, layer in quantized_layers(model).items():
        if name in wanted and layer.weight_quantizer is not None:
            found[name] = _rotate(name, layer, config)
    return model, finish(model, {"": found})


def _rotate(name: str, layer: QuantizedLayer, config: HadamardConfig) -> Metadata:
    if not layer.has_rows or layer.columns_per_feature != 1:
        return {"skipped": TAKES_NONE}
    if layer.input_quantizer is None and not config.weights_too:
        return {"skipped": NO_INPUT_QUANTIZER}
    if layer.hadamard_size:
        return {"skipped": ROTATED}
    weight = layer.weight_matrix(layer.weight.detach())
    size = config.size or _block_of(layer, weight.shape[1])
    if size < 2 or weight.shape[1] % size:
        return {"skipped": NO_BLOCK}
    rotated = layer.from_matrix(rotate_last(weight, size))
    trains = layer.weight.requires_grad
    layer._parameters["weight"] = nn.Parameter(rotated, requires_grad=trains)
    layer.hadamard_size = size
    set_max_scale(name, layer, "weight")
    return {"size": size}


def _block_of(layer: QuantizedLayer, features: int) -> int:
    """Return the size of a group of the input or weight, or the largest power of two that fits."""
    for quantizer in (layer.input_quantizer, layer.weight_quantizer):
        size = None if quantizer is None else quantizer.config.group_size
        if size is not None and size & (size - 1) == 0 and features % size == 0:
            return size
    return min(features & -features, _LARGEST)
