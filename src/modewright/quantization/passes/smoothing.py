# SPDX-License-Identifier: Apache-2.0
"""Modes ``smoothquant`` and ``awq``: move magnitude between the inputs of layers and their weights.

Both try several ways to scale the input channels of layers that share an input, and keep the one
with which the quantized layers come closest to the original ones; they differ in what they try.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modewright.calibration.driver import Block
from modewright.calibration.moments import row_weights
from modewright.quantization.algorithms.smoothing import awq_factors, smooth_factors
from modewright.quantization.blockwise import LayerGroup, OnBlock, input_rows, layer_groups, walk
from modewright.quantization.config import AwqConfig, SmoothquantConfig
from modewright.quantization.convert import quantized_layers
from modewright.quantization.folding import Fold, divide, find_fold
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.passes.records import finish, set_max_scale
from modewright.quantization.passes.weights import WeightGrid

Metadata = dict[str, Any]
Candidates = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
_ROWS = 512  # inputs that candidates are compared on
_CALLS = 8  # from which they are taken
ITSELF = "the layers themselves"
TAKES_NONE = "its input cannot be scaled"


def smoothquant(
    model: nn.Module,
    config: SmoothquantConfig,
    *,
    calibration: object = None,
    on_batch: OnBlock | None = None,
) -> tuple[nn.Module, Metadata]:
    """Divide inputs with outliers, whose range the weights then take over.

    Raises:
        DataError: There is no calibration data.
    """
    alphas = config.alphas if config.alpha is None else (config.alpha,)

    def candidates(rows: torch.Tensor, columns: torch.Tensor) -> list[torch.Tensor]:
        amax = columns.abs().amax(0)
        return [smooth_factors(rows.abs().amax(0), amax, alpha) for alpha in alphas]

    return _run(model, config, candidates, "smoothquant", calibration, on_batch)


def awq(
    model: nn.Module,
    config: AwqConfig,
    *,
    calibration: object = None,
    on_batch: OnBlock | None = None,
) -> tuple[nn.Module, Metadata]:
    """Enlarge the columns of weights that see large inputs, so that rounding costs them less.

    Raises:
        DataError: There is no calibration data.
    """
    ratios = [step / config.steps for step in range(1, config.steps + 1)]

    def candidates(rows: torch.Tensor, columns: torch.Tensor) -> list[torch.Tensor]:
        mean = rows.abs().mean(0)
        size = (columns.abs() / columns.abs().amax(1, keepdim=True).clamp_min(1e-30)).mean(0)
        with_weights = [awq_factors(mean, size, ratio) for ratio in ratios]
        return [*with_weights, *(awq_factors(mean, torch.ones_like(mean), r) for r in ratios)]

    return _run(model, config, candidates, "awq", calibration, on_batch)


def _run(
    model: nn.Module,
    config: SmoothquantConfig | AwqConfig,
    candidates: Candidates,
    mode: str,
    calibration: object,
    on_batch: OnBlock | None,
) -> tuple[nn.Module, Metadata]:
    def solve(block: Block) -> Metadata:
        found: Metadata = {}
        for group in layer_groups(block):
            found.update(_smooth(block, group, candidates, fold=config.fold))
        for name, layer in quantized_layers(block.module).items():
            if layer.weight_quantizer is not None:
                set_max_scale(name, layer, "weight")
        return found

    blocks = walk(
        model,
        calibration,
        solve,
        mode=mode,
        keep_original=False,
        precision=config.precision,
        on_batch=on_batch,
    )
    return model, finish(model, blocks)


def _smooth(
    block: Block, group: LayerGroup, candidates: Candidates, *, fold: bool
) -> dict[str, Metadata]:
    """Scale the input of a group by the best candidate, if one is better than none."""
    if not all(layer.columns_per_feature == 1 for layer in group.layers.values()):
        return {name: {"skipped": TAKES_NONE} for name in group.layers}
    rows = _sample(block, group)
    if rows is None:
        return {name: {"skipped": "it received no calibration data"} for name in group.layers}
    layers = list(group.layers.values())
    weights = [layer.weight_matrix(layer.weight.detach()).float() for layer in layers]
    place = find_fold(block, group) if fold else Fold("", None)
    best, factors = _error(layers, weights, rows, None), None
    before = best
    for candidate in candidates(rows, torch.cat(weights)):
        shared = place.shared(candidate)
        error = _error(layers, weights, rows, shared)
        if error < best:
            best, factors = error, shared
    if factors is not None:
        divide(place, group, factors)
    entry = {
        "folded_into": place.path or ITSELF,
        "relative_error_before": before,
        "relative_error": best,
    }
    return {name: dict(entry) for name in group.layers}


def _sample(block: Block, group: LayerGroup) -> torch.Tensor | None:
    """Return inputs of a group before they are quantized, from some of the calls, ``[n, in]``."""
    every = max(1, len(block.calls) // _CALLS)
    each = max(1, _ROWS // max(1, len(block.calls[::every])))
    found = []
    for rows in input_rows(block, group, quantized=False, every=every):
        if rows is not None and len(rows):
            rows = rows * row_weights(rows, limit=4.0)
            step = max(1, len(rows) // each)
            found.append(rows[::step][:each])  # with the first token, whose inputs are largest
    return torch.cat(found) if found else None


def _error(
    layers: list[QuantizedLayer],
    weights: list[torch.Tensor],
    rows: torch.Tensor,
    factors: torch.Tensor | None,
) -> float:
    """Return the squared error of the layers' outputs, relative to the outputs, for factors."""
    error = power = 0.0
    inputs = rows if factors is None else rows / factors
    for layer, weight in zip(layers, weights, strict=True):
        scaled = weight if factors is None else weight * factors
        seen = inputs if layer.input_quantizer is None else layer.input_quantizer.fresh(inputs)
        output = seen @ WeightGrid(layer).rounded(scaled).t()
        expected = rows @ weight.t()
        error += float((output - expected).square().sum())
        power += float(expected.square().sum())
    return error / max(power, 1e-30)
