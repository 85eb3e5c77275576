# SPDX-License-Identifier: Apache-2.0
"""Importance by activations: units whose loss changes what is computed from them least.

A layer that takes a unit in loses, on average over tokens, the squared norm of the unit's columns
times the mean square of its inputs. Only one number for each input feature has to be gathered. All
tokens count as they are: those with activations far above all others (the first of a text, in
language models) are what attention rests on, and units that make them must stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from modewright.calibration.forward import OnBatch, run_calibration
from modewright.pruning.graph.groups import DimensionGroup, Slice
from modewright.pruning.importance.magnitude import magnitudes


def mean_squares(
    model: nn.Module,
    layers: Iterable[str],
    calibration: object,
    *,
    on_batch: OnBatch | None = None,
) -> dict[str, torch.Tensor]:
    """Return the mean square of every input feature of linear layers, ``[in]`` float64.

    Args:
        model: The model.
        layers: Paths of linear layers.
        calibration: Batches, or a function that runs the model.
        on_batch: Called after each batch.

    Returns:
        By path; a layer that no data reached is missing.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def gather(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].detach().flatten(0, -2).float()
            square = rows.square().sum(0).double().cpu()
            sums[path] = sums[path] + square if path in sums else square
            counts[path] = counts.get(path, 0) + len(rows)

        return hook

    with ExitStack() as hooks:
        for path in layers:
            handle = model.get_submodule(path).register_forward_pre_hook(gather(path))
            hooks.callback(handle.remove)
        run_calibration(model, calibration, on_batch=on_batch)
    return {path: sums[path] / counts[path] for path in sums if counts[path]}


def activation_importance(
    model: nn.Module,
    groups: Sequence[DimensionGroup],
    calibration: object,
    *,
    on_batch: OnBatch | None = None,
) -> dict[str, torch.Tensor]:
    """Return how much depends on every unit of groups, ``[units]`` float64 by group name.

    It is the part of the mean squared output that layers lose without the unit, summed over the
    linear layers that take it in. A group that no linear layer takes in is judged by its weights.

    Args:
        model: The model.
        groups: Groups of this model.
        calibration: Batches, or a function that runs the model.
        on_batch: Called after each batch.
    """
    consumers = {
        group.name: [piece for piece in group.consumers if _is_linear(model, piece)]
        for group in groups
    }
    layers = {piece.module: None for pieces in consumers.values() for piece in pieces}
    squares = mean_squares(model, layers, calibration, on_batch=on_batch)
    found = {}
    for group in groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for piece in consumers[group.name]:
            if piece.module in squares:
                weight = model.get_submodule(piece.module).get_parameter("weight").detach()
                lost = weight.double().square().sum(0).cpu() * squares[piece.module]
                total += lost[piece.indices].sum(1) / lost.sum().clamp_min(1e-300)
        found[group.name] = total if bool(total.any()) else magnitudes(model, group).double()
    return found


def _is_linear(model: nn.Module, piece: Slice) -> bool:
    return piece.axis == 1 and isinstance(model.get_submodule(piece.module), nn.Linear)
