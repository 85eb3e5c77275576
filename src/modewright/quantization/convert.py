# SPDX-License-Identifier: Apache-2.0
"""What the modes ``quantize`` and ``export_quantize`` do: put quantizers in, fold them away."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from modewright.errors import CheckpointError
from modewright.quantization.config import QuantizeConfig, SchemeConfig
from modewright.quantization.layers import (
    QuantizedLayer,
    call_parts,
    insert_quantizers,
    read_parts,
    remove_quantizers,
)
from modewright.quantization.planning import plan_layers
from modewright.quantization.quantizer import Quantizer

Metadata = dict[str, Any]
ACTIVATIONS_DROPPED = (
    "its activations are no longer quantized: a plain layer has no place for their scale"
)
TRANSFORMS_FOLDED = (
    f"{ACTIVATIONS_DROPPED}; what was done to its inputs so that they quantize well is folded into "
    "the weight"
)


def quantize(model: nn.Module, config: QuantizeConfig) -> tuple[nn.Module, Metadata]:
    """Put quantizers on the layers that the rules pick."""
    plan = plan_layers(model, config)
    for name, scheme in plan.schemes.items():
        insert_quantizers(model.get_submodule(name), scheme)
    call_parts(model)
    metadata = {
        "layers": {name: scheme.model_dump(mode="json") for name, scheme in plan.schemes.items()},
        "skipped": [{"module": n, "reason": r.value} for n, r in plan.skipped.items()],
        "unmatched": list(plan.unmatched),
    }
    return model, metadata


def restore_quantize(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Put the recorded quantizers back, without scales."""
    known: dict[str, SchemeConfig] = {}  # most layers have the same one
    for name, recorded in metadata["layers"].items():
        key = repr(recorded)
        if key not in known:
            known[key] = SchemeConfig.model_validate(recorded)
        insert_quantizers(layer_named(model, name), known[key])
    call_parts(model)
    return model


def layer_named(model: nn.Module, name: str) -> nn.Module:
    """Return a submodule that the record names.

    Raises:
        CheckpointError: The model has none of that name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(
            f"The record names the layer {name!r}, but this {type(model).__name__} has none of "
            "that name: it is of another architecture."
        ) from error


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return all quantized layers by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return all quantizers by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}


def export_quantize(model: nn.Module) -> tuple[nn.Module, Metadata]:
    """Fold the quantized parameters into plain layers and remove all quantizers.

    What was set for the inputs of a layer is folded too: scale, rotation and low-rank branch become
    part of its weight. The scales of activations are gone afterwards: a plain layer cannot hold
    them.
    """
    folded: dict[nn.Parameter, nn.Parameter] = {}
    layers = quantized_layers(model)
    skipped = []
    for path, layer in layers.items():
        if layer.activation_quantizers():
            reason = TRANSFORMS_FOLDED if layer.transforms() else ACTIVATIONS_DROPPED
            skipped.append({"module": path, "reason": reason})
        made = _folded_parameters(layer, folded)
        remove_quantizers(layer)
        for name, parameter in made.items():
            setattr(layer, name, parameter)
    read_parts(model)
    return model, {"layers": list(layers), "skipped": skipped}


def _folded_parameters(
    layer: QuantizedLayer, folded: dict[nn.Parameter, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Return new parameters; one that is shared is folded once, kept in ``folded``, and shared."""
    transformed = bool(layer.transforms())
    names = dict.fromkeys(layer.quantized_parameters())
    if transformed:
        names["weight"] = None
    made = {}
    for name in names:
        own = cast(nn.Parameter, layer._parameters[name])
        alone = transformed and name == "weight"  # what is folded in belongs to this layer only
        if alone or own not in folded:
            with torch.no_grad():
                value = layer.folded_parameter(name).to(own.dtype).contiguous()
            made[name] = nn.Parameter(value, requires_grad=own.requires_grad)
            if not alone:
                folded[own] = made[name]
        else:
            made[name] = folded[own]
    return made


def restore_export(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Remove the quantizers; the folded weights come from the checkpoint."""
    for name in metadata["layers"]:
        remove_quantizers(cast(QuantizedLayer, layer_named(model, name)))
    read_parts(model)
    return model
