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
    insert_quantizers,
    remove_quantizers,
)
from modewright.quantization.planning import plan_layers
from modewright.quantization.quantizer import Quantizer

Metadata = dict[str, Any]


def quantize(model: nn.Module, config: QuantizeConfig) -> tuple[nn.Module, Metadata]:
    """Put quantizers on the layers that the rules pick."""
    plan = plan_layers(model, config)
    for name, scheme in plan.schemes.items():
        insert_quantizers(model.get_submodule(name), scheme)
    metadata = {
        "layers": {name: scheme.model_dump(mode="json") for name, scheme in plan.schemes.items()},
        "skipped": [{"module": n, "reason": r.value} for n, r in plan.skipped.items()],
        "unmatched": list(plan.unmatched),
    }
    return model, metadata


def restore_quantize(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Put the recorded quantizers back, without scales."""
    for name, scheme in metadata["layers"].items():
        insert_quantizers(layer_named(model, name), SchemeConfig.model_validate(scheme))
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
    """Fold the quantized weights into plain layers and remove all quantizers.

    The scales of activations are gone afterwards: a plain layer cannot hold them.
    """
    folded: dict[nn.Parameter, nn.Parameter] = {}
    layers = quantized_layers(model)
    activations = [
        name
        for name, layer in layers.items()
        if layer.input_quantizer is not None or layer.output_quantizer is not None
    ]
    for layer in layers.values():
        own = cast(nn.Parameter, layer._parameters["weight"])
        if layer.weight_quantizer is not None:
            if own not in folded:  # a shared weight is folded once and stays shared
                with torch.no_grad():
                    weight = layer.quantized_weight().contiguous()
                folded[own] = nn.Parameter(weight, requires_grad=own.requires_grad)
            layer._parameters["weight"] = folded[own]
        remove_quantizers(layer)
    reason = "its activations are no longer quantized: a plain layer has no place for their scale"
    metadata = {
        "layers": list(layers),
        "skipped": [{"module": name, "reason": reason} for name in activations],
    }
    return model, metadata


def restore_export(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Remove the quantizers; the folded weights come from the checkpoint."""
    for name in metadata["layers"]:
        remove_quantizers(cast(QuantizedLayer, layer_named(model, name)))
    return model
