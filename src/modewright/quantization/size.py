# SPDX-License-Identifier: Apache-2.0
"""What a quantized model weighs, or would weigh, with its weights packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from modewright.formats.grouping import Grouping
from modewright.quantization.layers import QuantizedLayer, layer_kind
from modewright.quantization.layers.base import TRANSFORM_BUFFERS
from modewright.quantization.representation import QuantizerConfig, SchemeConfig
from modewright.runtime.layers import PackedLayer

SCALE_BITS = {"fp32": 32, "e8m0": 8, "e4m3": 8}
GROUP_SCALE_BITS = 16  # of a float32 scale where there are many
TENSOR_SCALE_BITS = 32  # beside scales in e4m3


def packed_bytes(model: nn.Module, layers: Mapping[str, Any]) -> int:
    """Return the bytes of all parameters with the quantized ones of ``layers`` packed.

    What is packed counts as it is. Of other layers, scales count as many bits as they would be
    stored with, zero points as many as a weight; tied weights count once; low-rank branches, and
    everything that is not quantized, count as they are.

    Args:
        model: The model, with its quantizers, after they were folded, or packed.
        layers: The scheme of each quantized layer, as mode ``quantize`` recorded it.
    """
    bits: dict[int, int] = {}
    for parameter in model.parameters():
        bits[id(parameter)] = parameter.numel() * parameter.element_size() * 8
    for module in model.modules():
        for held in module._buffers.values() if isinstance(module, PackedLayer) else ():
            if held is not None:
                bits[id(held)] = held.numel() * held.element_size() * 8
    for path, recorded in layers.items():
        module = model.get_submodule(path)
        weights = SchemeConfig.model_validate(recorded).weights
        kind = layer_kind(module)
        if kind is None or isinstance(module, PackedLayer):
            continue
        scheme = SchemeConfig(weights=weights)
        for name, packed in (layer_bits(module, scheme) if weights is not None else {}).items():
            bits[id(module._parameters[name])] = packed
        for name in TRANSFORM_BUFFERS if isinstance(module, QuantizedLayer) else ():
            buffer = module._buffers.get(name)
            if buffer is not None:
                bits[id(buffer)] = buffer.numel() * buffer.element_size() * 8
    return sum(bits.values()) // 8


def layer_bits(module: nn.Module, scheme: SchemeConfig | None) -> dict[str, int]:
    """Return by name the bits of a layer's parameters that can be quantized, under a scheme.

    Args:
        module: A layer that can be quantized.
        scheme: What it would get; ``None`` to leave it as it is.
    """
    kind = layer_kind(module)
    found: dict[str, int] = {}
    for name in () if kind is None else kind.parameter_names(module):
        parameter = cast(nn.Parameter, module._parameters[name])
        if kind is None or scheme is None or scheme.weights is None:
            found[name] = parameter.numel() * parameter.element_size() * 8
            continue
        empty = torch.empty_like(parameter, device="meta")
        shape = kind.arranged(module, name, empty).shape
        found[name] = tensor_bits(scheme.weights, shape, kind.channel_axis)
    return found


def tensor_bits(config: QuantizerConfig, shape: torch.Size, channel_axis: int) -> int:
    """Return the bits of codes, scales and zero points of one tensor."""
    grouping = Grouping(config.granularity, config.group_size, channel_axis, config.block_size)
    rows, groups = grouping.scale_shape(shape)
    many = config.scale_format == "fp32" and config.granularity == "group"
    scale = GROUP_SCALE_BITS if many else SCALE_BITS[config.scale_format]
    each = scale + (0 if config.symmetric else config.num_bits)
    whole = TENSOR_SCALE_BITS if config.scale_format == "e4m3" else 0
    return shape.numel() * config.num_bits + rows * groups * each + whole
