# SPDX-License-Identifier: Apache-2.0
"""Importance by magnitude: units with small weights matter little."""

from __future__ import annotations

import torch
from torch import nn

from modewright.pruning.graph.groups import DimensionGroup


def magnitudes(model: nn.Module, group: DimensionGroup) -> torch.Tensor:
    """Return how large the weights of each unit are, ``[units]`` float32.

    It is the root of the mean square of a unit's weights, relative to the tensor's, over all
    matrices and filters that it lies in (Fang et al. 2023: DepGraph).
    """
    total = torch.zeros(group.size)
    for piece in group.slices:
        tensor = _tensor(model, piece.tensor).detach().float()
        if tensor.ndim < 2:
            continue
        rows = tensor.movedim(piece.axis, 0).flatten(1).square().mean(1).cpu()
        share = rows[piece.indices].mean(1)
        total += share / rows.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return total.sqrt()


def _tensor(model: nn.Module, path: str) -> torch.Tensor:
    holder, _, name = path.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(holder), name)
    return found
