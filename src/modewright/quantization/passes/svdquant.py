# SPDX-License-Identifier: Apache-2.0
"""Mode ``svdquant``: a branch of low rank in full precision beside every quantized weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modewright.calibration.driver import Block
from modewright.calibration.moments import row_weights
from modewright.quantization.algorithms.svdquant import low_rank
from modewright.quantization.blockwise import LayerGroup, OnBlock, input_rows, layer_groups, walk
from modewright.quantization.config import SvdquantConfig
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.passes.records import finish, set_max_scale
from modewright.quantization.passes.weights import WeightGrid

Metadata = dict[str, Any]
NO_BRANCH = "a branch of that rank is no smaller than the weight itself"


def convert(
    model: nn.Module,
    config: SvdquantConfig,
    *,
    calibration: object = None,
    on_batch: OnBlock | None = None,
) -> tuple[nn.Module, Metadata]:
    """Walk the blocks and give each layer its branch; what the branch leaves is quantized.

    Raises:
        DataError: There is no calibration data.
    """

    def solve(block: Block) -> Metadata:
        found: Metadata = {}
        for group in layer_groups(block):
            importance = mean_square(block, group)
            for name, layer in group.layers.items():
                found[name] = _solve_layer(name, layer, importance, config)
        return found

    blocks = walk(
        model,
        calibration,
        solve,
        mode="svdquant",
        keep_original=False,
        precision=config.precision,
        on_batch=on_batch,
    )
    return model, finish(model, blocks)


def mean_square(block: Block, group: LayerGroup) -> torch.Tensor | None:
    """Return the mean square of each input of a group, ``[in]``; ``None`` if it saw no data."""
    total, count = torch.zeros(()), 0
    for rows in input_rows(block, group):
        if rows is not None and len(rows):
            total = total + (rows * row_weights(rows, limit=1.0)).square().sum(0)
            count += len(rows)
    return total / count if count else None


def _solve_layer(
    name: str, layer: QuantizedLayer, importance: torch.Tensor | None, config: SvdquantConfig
) -> Metadata:
    layer.low_rank_up = layer.low_rank_down = None
    grid = WeightGrid(layer)
    if config.rank * 2 > min(grid.matrix.shape):
        set_max_scale(name, layer, "weight")
        return {"skipped": NO_BRANCH}
    up, down = low_rank(
        grid.matrix, config.rank, grid.rounded, iterations=config.iterations, importance=importance
    )
    before = _error(grid.matrix - grid.rounded(grid.matrix), importance)
    rest = grid.matrix - up @ down
    after = _error(rest - grid.rounded(rest), importance)
    layer.low_rank_up = up.to(layer.weight.dtype).contiguous()
    layer.low_rank_down = down.to(layer.weight.dtype).contiguous()
    set_max_scale(name, layer, "weight")
    return {"weighted_error_before": before, "weighted_error": after}


def _error(difference: torch.Tensor, importance: torch.Tensor | None) -> float:
    weighted = difference.square() if importance is None else difference.square() * importance
    return float(weighted.sum())
