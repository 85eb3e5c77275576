# SPDX-License-Identifier: Apache-2.0
"""Refitting the chosen subnet of a network, block by block, to what the whole network computes.

Two streams of hidden states are followed: that of the whole network and that of the subnet, whose
blocks before are refitted already. A layer that writes to the stream is solved for the difference
between the two, by ridge regression on calibration data: it makes up for the units that it lost,
for what blocks before lost, and for blocks that were dropped. No gradient is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from modewright.calibration.blocks import find_blocks
from modewright.calibration.driver import Block, walk_blocks
from modewright.errors import ConfigError, DataError
from modewright.pruning.depth.blocks import SkippableBlock
from modewright.pruning.refit.solve import refit_writer, streams_after
from modewright.pruning.refit.writers import find_writers
from modewright.pruning.space import close_space, is_elastic, open_space

Metadata = dict[str, Any]
OnBlock = Callable[[int, "int | None"], None]
_NO_WRITERS = "its output is not its input and what linear layers of it put out"


class _Cut:
    """A network in which the inputs that are cut are silent, and what it was before."""

    def __init__(self, model: nn.Module, kept: dict[str, dict[int, torch.Tensor]]) -> None:
        self.kept: dict[nn.Linear, torch.Tensor] = {}
        self.whole: dict[nn.Linear, tuple[Any, Any]] = {}
        for path, axes in kept.items():
            module = model.get_submodule(path.rpartition(".")[0])
            if type(module) is not nn.Linear:
                raise ConfigError(
                    f"Mode 'refit' serves networks that lost blocks, heads or inner widths of "
                    f"linear layers, but {path} of a {type(module).__name__} was cut: cut other "
                    "kinds of dimensions, or leave 'refit' out."
                )
            if 1 in axes:
                self.kept[module] = axes[1]
        for layer, columns in self.kept.items():
            self.remember(layer)
            silent = torch.zeros_like(layer.weight)
            silent[:, columns] = layer.weight.detach()[:, columns]
            layer.weight = nn.Parameter(silent, requires_grad=layer.weight.requires_grad)

    def remember(self, layer: nn.Linear) -> None:
        """Note what a layer is in the whole network, before it is changed."""
        self.whole.setdefault(layer, (layer.weight, layer.bias))

    def columns(self, layer: nn.Linear) -> torch.Tensor:
        """Return the inputs of a layer that are left."""
        return self.kept.get(layer, torch.arange(layer.in_features))

    @contextmanager
    def as_whole(self, module: nn.Module) -> Iterator[None]:
        """Let a module compute what it does in the whole network."""
        own = set(module.modules())
        blocks: list[Any] = [m for m in own if _is_skipped(m)]
        layers = {layer: (layer.weight, layer.bias) for layer in self.whole if layer in own}
        try:
            for block in blocks:
                block.skipped = False
            for layer in layers:
                layer.weight, layer.bias = self.whole[layer]
            yield
        finally:
            for block in blocks:
                block.skipped = True
            for layer, (weight, bias) in layers.items():
                layer.weight, layer.bias = weight, bias

    def put_back(self) -> None:
        """Give layers the weights back that they had for the inputs that are cut."""
        for layer, columns in self.kept.items():
            full = self.whole[layer][0].detach().clone()
            full[:, columns] = layer.weight.detach()[:, columns]
            layer.weight = nn.Parameter(full, requires_grad=layer.weight.requires_grad)


def refit(model: nn.Module, calibration: object, *, on_batch: OnBlock | None = None) -> Metadata:
    """Refit the chosen subnet of a network whose search space is open.

    Raises:
        DataError: There is no data.
        ConfigError: Something else than blocks and inputs of linear layers was cut.
    """
    if calibration is None:
        raise DataError(
            "mode 'refit' needs data that the model is run on: pass "
            "mode_kwargs={'calibration': batches}."
        )
    space = close_space(model) if is_elastic(model) else None
    cut = _Cut(model, {} if space is None else space.plan.kept)
    order = [model.get_submodule(path) for path in find_blocks(model)]
    skipped: list[dict[str, str]] = []
    with torch.no_grad():
        blocks = walk_blocks(
            model,
            calibration,
            lambda block: _visit(block, _dropped_after(block, order), cut, skipped),
            as_original=cut.as_whole,
            on_block=on_batch,
        )
    cut.put_back()
    if space is not None:
        open_space(model, space)
    missed = {name: found.pop("") for name, found in blocks.items() if "" in found}
    skipped += [{"module": name, "reason": why["skipped"]} for name, why in missed.items()]
    return {"blocks": {name: found for name, found in blocks.items() if found}, "skipped": skipped}


def _visit(
    block: Block, dropped: list[nn.Module], cut: _Cut, skipped: list[dict[str, str]]
) -> Metadata:
    module = block.module
    if _is_skipped(module):
        return {}
    with cut.as_whole(module):
        writers = find_writers(block, list(block.original_calls))
        streams = streams_after(block, writers)
    if not writers:
        skipped.append({"module": block.name, "reason": _NO_WRITERS})
    goals = _goals(block, dropped, cut)  # asked for before its writers change
    found: Metadata = {}
    for number, writer in enumerate(writers):
        cut.remember(writer.layer)
        last = number == len(writers) - 1
        wanted = goals if last and dropped else [stream[number] for stream in streams]
        columns = cut.columns(writer.layer)
        found[writer.path] = refit_writer(block, writers, number, wanted, columns)
    return found


def _goals(block: Block, dropped: list[nn.Module], cut: _Cut) -> list[torch.Tensor]:
    """Return the stream of the whole network after a block and the dropped ones behind it.

    The dropped blocks are called as this one is, but for the hidden state.
    """
    goals = [output.float() for output in block.original_outputs()]
    for module in dropped:
        follower = Block((block.name, block.index, block.total), module, [], [], cut.as_whole)
        with cut.as_whole(module):
            goals = [
                follower.run(call.with_hidden(goal)).float()
                for call, goal in zip(block.original_calls, goals, strict=True)
            ]
    return goals


def _dropped_after(block: Block, order: list[nn.Module]) -> list[nn.Module]:
    """Return the dropped blocks directly behind a block, if they are blocks of its kind."""
    behind = order[order.index(block.module) + 1 :]
    found = list(takewhile(_is_skipped, behind))
    own = type(block.module)
    return found if all(type(module) is own for module in found) else []


def _is_skipped(module: nn.Module) -> bool:
    return isinstance(module, SkippableBlock) and module.skipped
