# SPDX-License-Identifier: Apache-2.0
"""Closing a search space of pruning: the chosen subnet becomes a plain network."""

from __future__ import annotations

from typing import Any

from torch import nn

from modewright.pruning.depth.blocks import make_plain
from modewright.pruning.depth.export import drop_blocks, export_depth
from modewright.pruning.space import close_space, is_elastic
from modewright.pruning.surgery import CutPlan, cut

Metadata = dict[str, Any]


def convert(model: nn.Module) -> Metadata:
    """Cut widths, drop blocks; return what it takes to do it again."""
    plan = close_space(model).plan if is_elastic(model) else CutPlan()
    cut(model, plan)
    return {"plan": plan.to_data(), "dropped": export_depth(model)}


def restore(model: nn.Module, metadata: Metadata) -> None:
    """Do the recorded cut again, on a network whose search space was opened."""
    if is_elastic(model):
        close_space(model)
    cut(model, CutPlan.from_data(metadata["plan"]))
    make_plain(model)
    drop_blocks(model, metadata["dropped"])
