# SPDX-License-Identifier: Apache-2.0
"""Mode ``bias_correction``: take the mean error of every layer's output into its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modewright.calibration.driver import Block
from modewright.quantization.algorithms.bias_correction import bias_shift
from modewright.quantization.blockwise import LayerGroup, OnBlock, input_rows, layer_groups, walk
from modewright.quantization.config import BiasCorrectionConfig
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.passes.records import NO_TOKENS, finish

Metadata = dict[str, Any]
NO_BIAS = "it has no bias to correct"


def convert(
    model: nn.Module,
    config: BiasCorrectionConfig,
    *,
    calibration: object = None,
    on_batch: OnBlock | None = None,
) -> tuple[nn.Module, Metadata]:
    """Walk the blocks and correct each layer for the inputs that it gets by then.

    Raises:
        DataError: There is no calibration data.
    """

    def solve(block: Block) -> Metadata:
        found: Metadata = {}
        for group in layer_groups(block):
            mean = _mean_input(block, group)
            for name, layer in group.layers.items():
                found[name] = _solve_layer(layer, mean)
        return found

    blocks = walk(
        model, calibration, solve, mode="bias_correction", keep_original=False, on_batch=on_batch
    )
    return model, finish(model, blocks)


def _mean_input(block: Block, group: LayerGroup) -> torch.Tensor | None:
    total, count = torch.zeros(()), 0
    for rows in input_rows(block, group):
        if rows is not None and len(rows):
            total, count = total + rows.double().sum(0), count + len(rows)
    return total / count if count else None


def _solve_layer(layer: QuantizedLayer, mean: torch.Tensor | None) -> Metadata:
    bias = layer._parameters.get("bias")
    if bias is None:
        return {"skipped": NO_BIAS}
    if mean is None:
        return {"skipped": NO_TOKENS}
    with torch.no_grad():
        weight = layer.weight_matrix(layer.own_parameter("weight").detach())
        quantized = layer.weight_matrix(layer.effective_parameter("weight"))
        shift = bias_shift(mean, weight, quantized)
    corrected = (bias.detach().double() + shift).to(bias)
    layer._parameters["bias"] = nn.Parameter(corrected, requires_grad=bias.requires_grad)
    return {"largest_shift": float(shift.abs().max())}
