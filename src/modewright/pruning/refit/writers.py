# SPDX-License-Identifier: Apache-2.0
"""Which layers of a block write to the residual stream, and with which factor.

A block's output is its input and what some of its layers put out, each times a factor (1 in most
networks). Which layers these are is found by regression: the change of the stream is explained by
the outputs of all linear layers of the stream's width; if that leaves nothing over, those with a
factor write. No name and no architecture is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from modewright.calibration.calls import Call
from modewright.calibration.driver import Block

_TOLERANCE = 1e-3  # of the change that may stay unexplained; blocks may run in bfloat16
_NOTHING = 1e-2  # a smaller factor is none
_ROWS = 256


@dataclass(frozen=True)
class Writer:
    """A layer that writes to the stream.

    Attributes:
        path: In the block.
        layer: The layer.
        factor: What its output is multiplied with before it is added.
    """

    path: str
    layer: nn.Linear
    factor: float


def find_writers(block: Block, calls: list[Call]) -> list[Writer]:
    """Return the layers of a block that write to the stream, in the order in which they run.

    Args:
        block: The block, as it is run.
        calls: How it is called; the first is used.

    Returns:
        The writers; none if the block's output is not its input and what layers put out.
    """
    hidden = calls[0].hidden
    if hidden is None:
        return []
    layers = {
        path: module
        for path, module in block.module.named_modules()
        if type(module) is nn.Linear and module.out_features == hidden.shape[-1]
    }
    with torch.no_grad(), outputs_of(layers) as made:
        after = block.run(calls[0])
    if after.shape != hidden.shape or any(y.shape != after.shape for y in made.values()):
        return []
    if not made:
        return []
    factors = _explain(_rows(after.to(hidden.device) - hidden), [_rows(y) for y in made.values()])
    if factors is None:
        return []
    return [
        Writer(path, layers[path], factor)
        for path, factor in zip(made, factors, strict=True)
        if abs(factor) > _NOTHING
    ]


@contextmanager
def outputs_of(layers: dict[str, nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
    """Note what layers put out meanwhile, by path, in the order in which they run."""
    made: dict[str, torch.Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
            made[path] = output.detach()

        return hook

    handles = [layer.register_forward_hook(note(path)) for path, layer in layers.items()]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return some tokens of a tensor, ``[rows, width]`` float64."""
    rows = tensor.detach().flatten(0, -2).double().cpu()
    return rows[:: max(1, len(rows) // _ROWS)]


def _explain(change: torch.Tensor, columns: list[torch.Tensor]) -> list[float] | None:
    """Return the factors with which columns sum up to a change; ``None`` if they do not.

    Every token counts the same, however large the change is there.
    """
    scale = change.norm(dim=1, keepdim=True).clamp_min(1e-30)
    matrix = torch.stack([(column / scale).flatten() for column in columns], dim=1)
    wanted = (change / scale).flatten()
    factors = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
    left = (matrix @ factors - wanted).norm() / wanted.norm()
    return factors.tolist() if float(left) < _TOLERANCE else None
