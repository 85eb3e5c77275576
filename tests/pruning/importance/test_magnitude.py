# SPDX-License-Identifier: Apache-2.0
"""Importance by magnitude is what a loop over units would compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modewright.pruning.graph import DimensionGroup, trace_dimensions
from modewright.pruning.importance.magnitude import magnitudes
from support.prunable_networks import build


def slow(model: nn.Module, group: DimensionGroup) -> list[float]:
    named = dict([*model.named_parameters(), *model.named_buffers()])
    values = []
    for unit in range(group.size):
        total = 0.0
        for piece in group.slices:
            tensor = named[piece.tensor].detach()
            if tensor.ndim > 1:
                own = tensor.index_select(piece.axis, piece.indices[unit])
                total += float(own.square().mean() / tensor.square().mean())
        values.append(total**0.5)
    return values


@pytest.mark.parametrize("name", ["residual", "mobile", "grouped", "fused_attention"])
def test_it_is_what_a_loop_over_units_gives(name: str) -> None:
    model, example = build(name)
    for group in trace_dimensions(model, example).groups:
        found = magnitudes(model, group)
        torch.testing.assert_close(found, torch.tensor(slow(model, group)), rtol=1e-4, atol=1e-5)


def test_the_scale_of_a_layer_makes_no_difference() -> None:
    model, example = build("residual")
    (group, *_) = trace_dimensions(model, example).groups
    before = magnitudes(model, group)
    with torch.no_grad():
        model.stem.weight.mul_(100)
    torch.testing.assert_close(magnitudes(model, group), before)
