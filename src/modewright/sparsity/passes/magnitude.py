# SPDX-License-Identifier: Apache-2.0
"""Mode ``sparse_magnitude``: the smallest weights become zero. No data is needed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from modewright.layers.masks import add_masks, set_masked
from modewright.layers.matrices import from_matrix, to_matrix
from modewright.sparsity.algorithms.allocation import allocate, score_levels
from modewright.sparsity.algorithms.masks import choose_mask
from modewright.sparsity.algorithms.scores import magnitude_scores
from modewright.sparsity.config import SparseConfig, SparseMagnitudeConfig
from modewright.sparsity.passes.records import Metadata, record
from modewright.sparsity.planning import LayerSparsity, SparsePlan, plan_layers


def convert(model: nn.Module, config: SparseMagnitudeConfig) -> tuple[nn.Module, Metadata]:
    """Mask every layer by the magnitude of its weights."""
    plan = plan_layers(model, config, mode="sparse_magnitude")
    if config.allocation == "error":
        allot(model, plan, config, {})
    for path, layer in plan.layers.items():
        module = model.get_submodule(path)
        add_masks(module, layer.names)
        mask_by_magnitude(module, layer)
    patterns = {path: str(layer.pattern) for path, layer in plan.layers.items()}
    return model, record(model, patterns, plan.skipped, unmatched=list(plan.unmatched))


def mask_by_magnitude(module: nn.Module, layer: LayerSparsity) -> None:
    """Give a layer with masks those that keep the largest weights."""
    for name in layer.names:
        value = _parameter(module, name)
        scores = magnitude_scores(to_matrix(module, name, value))
        mask = choose_mask(scores, layer.pattern, layer.sparsity)
        set_masked(module, name, value, from_matrix(module, name, mask))


def allot(
    model: nn.Module, plan: SparsePlan, config: SparseConfig, power: dict[str, torch.Tensor]
) -> None:
    """Change the sparsities of a plan to those that cost least together.

    Args:
        model: The model.
        plan: The plan; layers whose pattern says the sparsity keep it.
        config: Says how far a layer's sparsity may be from the mean.
        power: Of layers whose inputs were seen the sum of squares of every input, ``[in]``.
    """
    open_ones = {p: s for p, s in plan.layers.items() if s.pattern.fixed_sparsity is None}
    levels, sizes = [], []
    for path, layer in open_ones.items():
        module = model.get_submodule(path)
        own = [to_matrix(module, name, _parameter(module, name)) for name in layer.names]
        scores = [magnitude_scores(matrix) * power.get(path, 1.0) for matrix in own]
        levels.append(score_levels(torch.cat([s.flatten() for s in scores])))
        sizes.append(sum(matrix.numel() for matrix in own))
    if not open_ones:
        return
    mean = sum(s.sparsity * n for s, n in zip(open_ones.values(), sizes, strict=True)) / sum(sizes)
    for (path, layer), part in zip(
        open_ones.items(), allocate(levels, sizes, mean, config.span), strict=True
    ):
        plan.layers[path] = replace(layer, sparsity=part)


def _parameter(module: nn.Module, name: str) -> torch.Tensor:
    value: torch.Tensor = getattr(module, name).detach()
    return value
