# SPDX-License-Identifier: Apache-2.0
"""How far a network that is pruned for trial is from the one that it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from modewright.calibration.calls import first_tensor
from modewright.calibration.forward import evaluating, run_batch
from modewright.errors import DataError

_REFERENCE_BYTES = 256 * 2**20


class Effect:
    """Measures a network against its own outputs as they are now.

    The measure is the mean divergence KL(now || later) per token, in nats, for networks that put
    out ``logits``; for others the mean squared change of the output, as a part of its mean square.

    Args:
        model: The network as it is before anything is tried.
        batches: What it is run on, each as ``run_batch`` takes it.

    Raises:
        DataError: There are no batches, or the network puts out no tensor.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        if not batches:
            raise DataError(
                "A search by measured effect needs data that the model is run on: pass "
                "calibration=batches."
            )
        self._batches = batches
        self._reference: list[torch.Tensor] = []
        self._share: int | None = None  # rows of logits that are kept of a batch
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                self._reference.append(self._kept(run_batch(model, batch)))

    def __call__(self, model: nn.Module) -> float:
        """Return how far the network is now from what it was."""
        with torch.no_grad(), evaluating(model):
            changes = [
                self._change(reference, run_batch(model, batch))
                for reference, batch in zip(self._reference, self._batches, strict=True)
            ]
        return sum(changes) / len(changes)

    def _kept(self, output: Any) -> torch.Tensor:
        """Return what is compared of an output: log-probabilities of some tokens, or all of it."""
        logits = getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor):
            tensor = first_tensor(output)
            if tensor is None:
                raise DataError("The network puts out no tensor that could be compared.")
            return tensor.float()
        rows = logits.flatten(0, -2)
        if self._share is None:
            room = _REFERENCE_BYTES // len(self._batches) // (4 * rows.shape[-1])
            self._share = max(1, room)
        step = -(-len(rows) // self._share)
        return rows[::step].float().log_softmax(-1)

    def _change(self, reference: torch.Tensor, output: Any) -> float:
        now = self._kept(output)
        if getattr(output, "logits", None) is None:
            return float((now - reference).square().mean() / reference.square().mean())
        return float((reference.exp() * (reference - now)).sum(-1).mean())


def mean_loss(
    model: nn.Module,
    batches: Sequence[Any],
    loss_func: Callable[[nn.Module, Any], torch.Tensor],
) -> float:
    """Return the mean of a loss over batches, in eval mode.

    Raises:
        DataError: There are no batches.
    """
    if not batches:
        raise DataError("A search by loss needs data: pass calibration=batches.")
    with torch.no_grad(), evaluating(model):
        losses = [float(loss_func(model, batch)) for batch in batches]
    return sum(losses) / len(losses)


def some_batches(calibration: object, count: int) -> list[Any]:
    """Return as many batches as wanted, spread evenly over the data.

    Args:
        calibration: An iterable of batches; a function that runs the model cannot be used here.
        count: How many at most.

    Raises:
        DataError: It is no iterable.
    """
    if calibration is None:
        return []
    if not isinstance(calibration, Iterable):
        raise DataError(
            "A search compares outputs batch by batch, so calibration must be an iterable of "
            f"batches; received {type(calibration).__name__}."
        )
    batches = list(calibration)
    step = max(1, len(batches) // count)
    return batches[::step][:count]
