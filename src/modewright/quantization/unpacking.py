# SPDX-License-Identifier: Apache-2.0
"""What the mode ``decompress`` does: plain layers again, with weights as the packed ones were."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modewright.errors import CheckpointError
from modewright.quantization.convert import (
    ACTIVATIONS_DROPPED,
    TRANSFORMS_FOLDED,
    export_quantize,
    layer_named,
    restore_export,
)
from modewright.quantization.layers import read_parts
from modewright.runtime.layers import PackedLayer, make_plain
from modewright.runtime.layers.fused import unfuse

Metadata = dict[str, Any]


def decompress(model: nn.Module) -> tuple[nn.Module, Metadata]:
    """Unpack all packed layers, and fold the quantizers of those that had stayed as they were.

    What was set for the inputs of a layer is folded into its weight; the quantizers of activations
    are gone afterwards.
    """
    unfuse(model)
    skipped = []
    unpacked: dict[int, nn.Parameter] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLayer)}
    for path, layer in layers.items():
        record = layer.record
        changed = bool(record.transforms or record.hadamard_size)
        if record.activations:
            reason = TRANSFORMS_FOLDED if changed else ACTIVATIONS_DROPPED
            skipped.append({"module": path, "reason": reason})
        made = {}
        for name in record.parameters:
            key = id(layer.packed_weight(name).packed)
            alone = changed and name == "weight"  # what is folded in belongs to this layer only
            if alone or key not in unpacked:
                with torch.no_grad():
                    made[name] = nn.Parameter(layer.plain_parameter(name).contiguous())
                if not alone:
                    unpacked[key] = made[name]
            else:
                made[name] = unpacked[key]
        make_plain(layer, made)
    _, folded = export_quantize(model)
    return model, {
        "layers": list(layers),
        "folded": folded["layers"],
        "skipped": [*skipped, *folded["skipped"]],
    }


def restore_decompress(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Give the recorded layers their own class back; the weights come from the checkpoint.

    Raises:
        CheckpointError: A recorded layer is not packed.
    """
    unfuse(model)
    made: dict[int, nn.Parameter] = {}
    for path in metadata["layers"]:
        layer = layer_named(model, path)
        if not isinstance(layer, PackedLayer):
            raise CheckpointError(
                f"The record unpacks the layer {path!r}, which is a {type(layer).__name__} and not "
                "packed."
            )
        own = {}
        for name, parameter in layer.record.parameters.items():
            packed = layer.packed_weight(name).packed
            if id(packed) not in made:
                empty = torch.empty(
                    parameter.shape, dtype=layer.compute_dtype, device=packed.device
                )
                made[id(packed)] = nn.Parameter(empty)
            own[name] = made[id(packed)]
        make_plain(layer, own)
    read_parts(model)
    return restore_export(model, {"layers": metadata["folded"]})
