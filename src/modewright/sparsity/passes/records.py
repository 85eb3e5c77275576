# SPDX-License-Identifier: Apache-2.0
"""What all sparsity modes record, and how that is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from modewright.errors import CheckpointError
from modewright.layers.masks import (
    MaskedLayer,
    add_masks,
    mask_of,
    masked_layers,
    masked_parameters,
    remove_masks,
)

Metadata = dict[str, Any]


def record(
    model: nn.Module, patterns: Mapping[str, str], skipped: Mapping[str, str], **more: Any
) -> Metadata:
    """Return the metadata of a mode that put masks on layers.

    Args:
        model: The model with masks.
        patterns: The pattern of every layer that got masks, by path.
        skipped: Why layers stay dense.
        more: What else is to be recorded.
    """
    layers: Metadata = {}
    zeros = total = 0
    for path, layer in masked_layers(model).items():
        masks = [m for n in masked_parameters(layer) if (m := mask_of(layer, n)) is not None]
        own = sum(int((~mask).sum()) for mask in masks)
        size = sum(mask.numel() for mask in masks)
        layers[path] = {
            "parameters": list(masked_parameters(layer)),
            "pattern": patterns[path],
            "sparsity": own / max(size, 1),
        }
        zeros, total = zeros + own, total + size
    return {
        "layers": layers,
        "sparsity": zeros / max(total, 1),
        "skipped": [{"module": path, "reason": reason} for path, reason in skipped.items()],
        **more,
    }


def restore(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Make room for the recorded masks; they and the weights come from the checkpoint.

    Raises:
        CheckpointError: The model has no layer of a recorded name, or not its parameters.
    """
    for path, entry in metadata["layers"].items():
        try:
            layer = model.get_submodule(path)
            add_masks(layer, entry["parameters"])
        except (AttributeError, KeyError) as error:
            raise CheckpointError(
                f"The record puts masks on {path!r}, but this {type(model).__name__} has no such "
                "layer with these parameters: it is of another architecture."
            ) from error
    return model


def export(model: nn.Module) -> tuple[nn.Module, Metadata]:
    """Fold all masks into plain layers."""
    folded = [path for path, m in model.named_modules() if isinstance(m, MaskedLayer)]
    for path in folded:
        remove_masks(model.get_submodule(path))
    return model, {"layers": folded}


def restore_export(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Give the recorded layers their own class back; the folded weights are in the checkpoint."""
    for path in metadata["layers"]:
        remove_masks(model.get_submodule(path))
    return model
