# SPDX-License-Identifier: Apache-2.0
"""Closing a search space of pruning: the chosen subnet becomes a plain network."""

from __future__ import annotations

from typing import Any

from torch import nn

from modewright.pruning.config_search import cut_lengths, find_entries
from modewright.pruning.depth.blocks import make_plain
from modewright.pruning.depth.export import drop_blocks, export_depth
from modewright.pruning.model_config import (
    config_problem,
    has_config,
    replace_config,
    set_entries,
    shapes_problem,
)
from modewright.pruning.space import close_space, is_elastic
from modewright.pruning.surgery import CutPlan, cut

Metadata = dict[str, Any]


def convert(model: nn.Module) -> Metadata:
    """Cut widths, drop blocks, correct the config; return what it takes to do it again.

    A config that cannot say what the model is now, for example because widths differ between
    blocks, is listed under ``skipped`` with the reason.
    """
    plan = close_space(model).plan if is_elastic(model) else CutPlan()
    lengths = cut_lengths(model, plan.kept)
    cut(model, plan)
    metadata: Metadata = {"plan": plan.to_data(), "dropped": export_depth(model)}
    if not has_config(model):
        return metadata
    entries = find_entries(model, lengths)
    _set_entries(model, entries)
    problem = shapes_problem(model) if entries is None else config_problem(model)
    skipped = []
    if problem is not None:
        reason = (
            f"it cannot say what the model is now, so from_pretrained does not load it: {problem}"
        )
        skipped.append({"module": "config.json", "reason": reason})
    return {**metadata, "config": entries, "skipped": skipped}


def restore(model: nn.Module, metadata: Metadata) -> None:
    """Do the recorded cut again, on a network whose search space was opened."""
    if is_elastic(model):
        close_space(model)
    cut(model, CutPlan.from_data(metadata["plan"]))
    make_plain(model)
    drop_blocks(model, metadata["dropped"])
    _set_entries(model, metadata.get("config"))


def _set_entries(model: nn.Module, entries: dict[str, Any] | None) -> None:
    if entries:
        replace_config(model)
        set_entries(model, entries)
