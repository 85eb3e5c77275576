# SPDX-License-Identifier: Apache-2.0
"""What all calibrating modes record, and how that is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from modewright.errors import DataError
from modewright.quantization.convert import layer_named, quantized_layers, quantizers
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.quantizer import BUFFERS, Quantizer

Metadata = dict[str, Any]
NOT_REACHED = "this mode does not reach it: its weight has max scales"
NO_TOKENS = "it received no calibration data: its weight is rounded to nearest"


def require_tokens(
    seen: int, layer: QuantizedLayer, minimum: int, found: Metadata, name: str
) -> bool:
    """Whether a layer saw enough rows; note it if it did not, and round it to nearest."""
    if seen >= max(minimum, 1):
        return True
    if layer.weight_quantizer is not None:
        layer.weight_quantizer.set_from_tensor(layer.to_quantize("weight").detach())
    few = f"it saw only {seen} of {minimum} tokens: its weight is rounded to nearest"
    found[name] = {"skipped": few if seen else NO_TOKENS}
    return False


def set_max_scale(path: str, layer: QuantizedLayer, parameter: str) -> None:
    """Take the scales of one parameter from its largest magnitudes.

    Raises:
        DataError: It holds values that are not finite.
    """
    quantizer = layer.quantized_parameters()[parameter]
    try:
        quantizer.set_from_tensor(layer.to_quantize(parameter).detach())
    except DataError as error:
        raise DataError(f"The {parameter} of {path!r} cannot be quantized: {error}") from error


def settle_shared(model: nn.Module) -> None:
    """Give layers that share a weight the same scales and codes, so that it can be stored once.

    A layer that multiplies by the weight decides for a table that rows of it are looked up in: it
    is the one that knows how much each input counts.
    """
    holders: dict[int, list[tuple[QuantizedLayer, Quantizer]]] = {}
    for layer in quantized_layers(model).values():
        for name, quantizer in layer.quantized_parameters().items():
            if layer.low_rank_up is None:
                holders.setdefault(id(layer.held_parameter(name)), []).append((layer, quantizer))
    for sharing in holders.values():
        _, chosen = next((pair for pair in sharing if pair[0].has_rows), sharing[0])
        for _, quantizer in sharing:
            if quantizer.config == chosen.config and chosen.scale is not None:
                for buffer in BUFFERS:
                    setattr(quantizer, buffer, getattr(chosen, buffer))


def finish(model: nn.Module, blocks: Mapping[str, Metadata]) -> Metadata:
    """Return the metadata of a pass: what it did to each layer, and every buffer that is there.

    Weights that the pass did not reach (outside all blocks, or of layers that it cannot solve)
    get max scales, so that what is saved is what was measured.
    """
    layers: Metadata = {}
    for block, found in blocks.items():
        for name, entry in found.items():
            layers[f"{block}.{name}".strip(".")] = entry  # a whole block, or model, has no name
    skipped = [
        {"module": name, "reason": entry.pop("skipped")}
        for name, entry in layers.items()
        if "skipped" in entry
    ]
    known = {item["module"] for item in skipped}
    for name, layer in quantized_layers(model).items():
        for parameter, quantizer in layer.quantized_parameters().items():
            if quantizer.scale is None and not quantizer.config.dynamic:
                set_max_scale(name, layer, parameter)
                if name not in known:
                    known.add(name)
                    skipped.append({"module": name, "reason": NOT_REACHED})
    settle_shared(model)
    return {
        **buffers_of(model),
        "solved": {name: entry for name, entry in layers.items() if entry},
        "skipped": skipped,
    }


def buffers_of(model: nn.Module) -> Metadata:
    """Return the shapes of everything that calibration added to a quantized model."""
    return {
        "scales": {name: q.shapes() for name, q in quantizers(model).items() if q.shapes()},
        "transforms": {
            name: layer.transforms()
            for name, layer in quantized_layers(model).items()
            if layer.transforms()
        },
    }


def restore_buffers(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Make room for what the checkpoint holds."""
    layers = quantized_layers(model)
    for name, transforms in metadata.get("transforms", {}).items():
        cast(QuantizedLayer, layer_named(model, name)).allocate_transforms(transforms)
    for name, recorded in metadata["scales"].items():
        quantizer = cast(Quantizer, layer_named(model, name))
        layer = layers[name.rpartition(".")[0]]
        quantizer.allocate(buffer_shapes(recorded, quantizer), layer.parameter_device())
    return model


def buffer_shapes(recorded: Any, quantizer: Quantizer) -> dict[str, list[int]]:
    """Return the shapes of a quantizer's buffers; early records hold that of the scale alone."""
    if isinstance(recorded, dict):
        return recorded
    names = ("scale",) if quantizer.config.symmetric else ("scale", "zero_point")
    return {name: list(recorded) for name in names}
