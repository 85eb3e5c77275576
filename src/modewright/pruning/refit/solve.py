# SPDX-License-Identifier: Apache-2.0
"""Refitting one block: each of its writers is solved so that the stream after it is what it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modewright.calibration.calls import Call
from modewright.calibration.driver import Block
from modewright.pruning.algorithms.least_squares import ridge
from modewright.pruning.refit.writers import Writer, outputs_of

Metadata = dict[str, Any]
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_HELD_BACK = 4  # every so many calls one is held back to choose the damping


@dataclass
class Moments:
    """Sums over tokens from which a layer is solved, ``x`` its inputs and ``t`` what is wanted.

    Attributes:
        hessian: ``sum x x^T``, ``[in, in]``.
        cross: ``sum t x^T``, ``[out, in]``.
        square: ``sum |t|^2``.
    """

    hessian: torch.Tensor
    cross: torch.Tensor
    square: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, target: torch.Tensor) -> Moments:
        """Gather the sums of one call: ``rows`` ``[n, in]``, ``target`` ``[n, out]``."""
        return cls(rows.t() @ rows, target.t() @ rows, target.square().sum())

    def __add__(self, other: Moments) -> Moments:
        """Return the sums over both."""
        return Moments(
            self.hessian + other.hessian, self.cross + other.cross, self.square + other.square
        )

    def error(self, weight: torch.Tensor) -> float:
        """Return the squared error that a weight leaves, as a part of what is wanted squared."""
        fitted = ((weight @ self.hessian) * weight).sum() - 2 * (weight * self.cross).sum()
        return float((self.square + fitted) / self.square.clamp_min(1e-30))


def solve(own: torch.Tensor, fitted: Moments, held: Moments | None) -> tuple[torch.Tensor, float]:
    """Return the refitted weight, and the damping with which it was found; 0 if it stays.

    The damping is the one under which a fit to most of the data is best on the rest. If none
    improves that, the weight stays as it is.

    Args:
        own: The weight as it is, ``[out, in]`` float32.
        fitted: Most of the data.
        held: The rest; without it the middle damping is taken.
    """
    if held is None:
        middle = DAMPINGS[len(DAMPINGS) // 2]
        return ridge(own, fitted.hessian, fitted.cross, middle), middle
    errors = {
        damping: held.error(ridge(own, fitted.hessian, fitted.cross, damping))
        for damping in DAMPINGS
    }
    best = min(errors, key=lambda damping: errors[damping])
    if errors[best] >= held.error(own):
        return own, 0.0
    both = fitted + held
    return ridge(own, both.hessian, both.cross, best), best


def streams_after(block: Block, writers: Sequence[Writer]) -> list[list[torch.Tensor]]:
    """Return for every original call the stream after each writer, in the block as it is now."""
    found = []
    with torch.no_grad(), outputs_of({w.path: w.layer for w in writers}) as made:
        for call in block.original_calls:
            block.run(call)
            stream, streams = _hidden(call), []
            for writer in writers:
                stream = stream + writer.factor * made[writer.path].to(stream)
                streams.append(stream)
            found.append(streams)
    return found


def refit_writer(
    block: Block,
    writers: Sequence[Writer],
    number: int,
    wanted: Sequence[torch.Tensor],
    kept: torch.Tensor,
) -> Metadata:
    """Solve one writer for the stream that is wanted after it.

    Args:
        block: The block, with the writers before this one solved.
        writers: All writers of the block, in the order in which they run.
        number: Which of them.
        wanted: For every call the stream after this writer, ``[..., width]``.
        kept: The inputs that are left, ``[n]`` int64; the weights of others stay zero.

    Returns:
        The damping, and the squared error before and after as parts of what is wanted.
    """
    layer = writers[number].layer
    parts: list[Moments | None] = [None, None]
    for place, (inputs, target) in enumerate(_pairs(block, writers, number, wanted)):
        rows = inputs[..., kept].flatten(0, -2)
        if layer.bias is not None:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        found = Moments.of(rows, target.flatten(0, -2))
        which = int(place % _HELD_BACK == _HELD_BACK - 1)
        before = parts[which]
        parts[which] = found if before is None else before + found
    fitted, held = parts
    if fitted is None:
        return {"damping": 0.0}
    own = layer.weight.detach().float()[:, kept]
    if layer.bias is not None:
        own = torch.cat([own, layer.bias.detach().float()[:, None]], dim=1)
    solved, damping = solve(own, fitted, held)
    every = fitted if held is None else fitted + held
    if damping:
        _set(layer, solved, kept)
    return {
        "damping": damping,
        "error_before": max(0.0, every.error(own)),
        "error": max(0.0, every.error(solved)),
    }


def _pairs(
    block: Block, writers: Sequence[Writer], number: int, wanted: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for every call the inputs of a writer, and what it should put out."""
    earlier = writers[:number]
    writer = writers[number]
    with (
        torch.no_grad(),
        _stopping_at(writer.layer) as reached,
        outputs_of({w.path: w.layer for w in earlier}) as made,
    ):
        for call, goal in zip(block.calls, wanted, strict=True):
            reached.clear()
            with suppress(_Reached):
                block.run(call)
            missing = (goal - _hidden(call)).to(writer.layer.weight.device)
            for other in earlier:
                missing = missing - other.factor * made[other.path].to(missing)
            yield reached[0].to(missing), missing / writer.factor


class _Reached(BaseException):
    """Ends a forward pass once a layer's input was seen; never leaves this file."""


@contextmanager
def _stopping_at(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Stop every run at a layer, and note what it was given."""
    reached: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        reached.append(args[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield reached
    finally:
        handle.remove()


def _hidden(call: Call) -> torch.Tensor:
    hidden = call.hidden
    return torch.zeros(()) if hidden is None else hidden.float()


def _set(layer: nn.Linear, solved: torch.Tensor, kept: torch.Tensor) -> None:
    """Give a layer its new weight, as it was for inputs that are gone, and its new bias."""
    weight = layer.weight.detach().clone()
    weight[:, kept] = solved[:, : len(kept)].to(weight)
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        bias = solved[:, -1].to(layer.bias.dtype).contiguous()
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
