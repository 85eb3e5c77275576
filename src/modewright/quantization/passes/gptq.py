# SPDX-License-Identifier: Apache-2.0
"""Mode ``gptq``: choose the codes of every weight so that the layer's output changes least."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modewright.calibration.driver import Block
from modewright.calibration.moments import second_moments
from modewright.layers.masks import mask_of
from modewright.least_squares import corrected_target, output_error
from modewright.quantization.algorithms.gptq import gptq
from modewright.quantization.blockwise import (
    OnBlock,
    exact_activations,
    input_rows,
    layer_groups,
    walk,
)
from modewright.quantization.config import GptqConfig
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.passes.records import finish, require_tokens
from modewright.quantization.passes.weights import WeightGrid

Metadata = dict[str, Any]


def convert(
    model: nn.Module,
    config: GptqConfig,
    *,
    calibration: object = None,
    on_batch: OnBlock | None = None,
    checkpoint: str | Path | None = None,
) -> tuple[nn.Module, Metadata]:
    """Walk the blocks and solve each group of layers.

    Raises:
        DataError: There is no calibration data.
    """

    def solve(block: Block) -> Metadata:
        found: Metadata = {}
        for group in layer_groups(block):
            originals = input_rows(block, group, original=True) if config.correct_inputs else None
            hessian, cross, tokens = second_moments(
                input_rows(block, group), originals, config.max_row_norm
            )
            for name, layer in group.layers.items():
                if require_tokens(tokens, layer, config.min_tokens, found, name):
                    found[name] = _solve_layer(layer, hessian, cross, config)
        return found

    with exact_activations(model) if config.exact_inputs else nullcontext():
        blocks = walk(
            model,
            calibration,
            solve,
            mode="gptq",
            keep_original=config.correct_inputs,
            precision=config.precision,
            on_batch=on_batch,
            checkpoint=checkpoint,
            config=config,
        )
    return model, finish(model, blocks)


def _solve_layer(
    layer: QuantizedLayer, hessian: torch.Tensor, cross: torch.Tensor | None, config: GptqConfig
) -> Metadata:
    grid = WeightGrid(layer)
    weight = grid.matrix
    target = weight
    if cross is not None:
        target = corrected_target(weight, hessian, cross, damping=config.correction_damping)
    mask = mask_of(layer)
    kept = None if mask is None else layer.weight_matrix(mask)
    importance = hessian.diagonal().expand_as(target)
    fitted = target if kept is None else target * kept  # what is masked takes no part of the range
    grid.set_scale(fitted, importance=importance if config.search_scale else None)
    scale, zero_point = grid.expanded()
    values = gptq(
        target,
        hessian,
        scale,
        zero_point,
        grid.format,
        damping=config.damping,
        activation_order=config.activation_order,
        mask=kept,
    )
    nearest = grid.nearest(fitted)
    errors = [output_error(target, grid.values(v), hessian).sum() for v in (values, nearest)]
    grid.choose(values if errors[0] <= errors[1] else nearest)
    power = output_error(target, torch.zeros_like(target), hessian).sum().clamp_min(1e-30)
    return {
        "relative_error": float(min(errors) / power),
        "relative_error_nearest": float(errors[1] / power),
    }
