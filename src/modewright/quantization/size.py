# SPDX-License-Identifier: Apache-2.0
"""What a quantized model would weigh with its weights packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from modewright.quantization.layers import channel_axis
from modewright.quantization.representation import SchemeConfig

SCALE_BITS = 16


def packed_bytes(model: nn.Module, layers: Mapping[str, Any]) -> int:
    """Return the bytes of all parameters if the weights of ``layers`` were packed.

    Scales count 16 bits each, zero points as many as a weight; tied weights count once; everything
    that is not quantized counts as it is.

    Args:
        model: The model, with its quantizers or after they were folded.
        layers: The scheme of each quantized layer, as mode ``quantize`` recorded it.
    """
    bits: dict[int, int] = {}
    for parameter in model.parameters():
        bits[id(parameter)] = parameter.numel() * parameter.element_size() * 8
    for name, recorded in layers.items():
        weights = SchemeConfig.model_validate(recorded).weights
        weight = model.get_submodule(name)._parameters["weight"]
        if weights is None or weight is None:
            continue
        channels = weight.shape[channel_axis(model.get_submodule(name))]
        inputs = weight.numel() // max(channels, 1)
        groups = {"tensor": 1, "channel": channels}.get(weights.granularity)
        if groups is None:
            groups = channels * -(-inputs // (weights.group_size or inputs))
        extra = SCALE_BITS + (0 if weights.symmetric else weights.num_bits)
        bits[id(weight)] = weight.numel() * weights.num_bits + groups * extra
    return sum(bits.values()) // 8
