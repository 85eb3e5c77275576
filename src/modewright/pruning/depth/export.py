# SPDX-License-Identifier: Apache-2.0
"""Closing the space that mode ``depth`` opens: what is skipped is removed for good."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from modewright.pruning.depth.blocks import make_plain, remove_blocks, skipped_blocks
from modewright.pruning.model_config import (
    KeptBlocks,
    has_config,
    note_kept_blocks,
    replace_config,
)


def export_depth(model: nn.Module) -> list[str]:
    """Remove the blocks that are skipped; return their paths, with which to do it again."""
    dropped = skipped_blocks(model)
    make_plain(model)
    drop_blocks(model, dropped)
    return dropped


def drop_blocks(model: nn.Module, dropped: Sequence[str]) -> None:
    """Remove blocks from a model, and from its config if it has one."""
    kept = _kept(model, dropped)
    remove_blocks(model, dropped)
    if kept and has_config(model):
        replace_config(model)
        note_kept_blocks(model, kept)


def _kept(model: nn.Module, dropped: Sequence[str]) -> dict[str, KeptBlocks]:
    """Return what stays of every list that loses blocks."""
    found = {}
    for holder in {path.rpartition(".")[0] for path in dropped}:
        paths = [
            f"{holder}.{name}" if holder else name
            for name, _ in model.get_submodule(holder).named_children()
        ]
        places = tuple(place for place, path in enumerate(paths) if path not in dropped)
        found[holder] = KeptBlocks(len(paths), places)
    return found
