# SPDX-License-Identifier: Apache-2.0
"""How far outputs are from the original network's: what is minimised by gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.calibration.forward import run_batch
from modewright.calibration.precision import Precision, automatic_precision
from modewright.calibration.unit_data import Original
from modewright.errors import DataError
from modewright.evaluation.outputs import main_output

OutputLoss = Literal["auto", "kl", "mse"]
_ROWS_IN_A_STEP = 1024


def output_distance(
    model: nn.Module,
    batch: object,
    as_original: Original,
    *,
    loss: OutputLoss = "auto",
    precision: Precision = "auto",
    who: str = "a loss",
) -> torch.Tensor:
    """Return how far a network's output is from the original's, on one batch; differentiable.

    Args:
        model: The network.
        batch: What it is run on.
        as_original: A context in which it computes what the original does.
        loss: ``"kl"`` for the divergence of predictions, ``"mse"`` for the squared error by the
            variance, ``"auto"`` for whichever fits the outputs.
        precision: Of matrix products.
        who: What compares outputs, for messages.

    Raises:
        DataError: The output holds no tensor that can be compared.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with automatic_precision(device, precision):
        with torch.no_grad(), as_original(model):
            wanted, are_logits = main_output(run_batch(model, batch), who)
        got, _ = main_output(run_batch(model, batch), who)
    wanted, got = wanted.detach().float(), got.float()
    if loss == "kl" or (loss == "auto" and are_logits):
        return F.kl_div(
            F.log_softmax(got, -1).flatten(0, -2),
            F.log_softmax(wanted, -1).flatten(0, -2),
            reduction="batchmean",
            log_target=True,
        )
    return F.mse_loss(got, wanted) / wanted.var().clamp_min(torch.finfo(torch.float32).tiny)


def repeatable_batches(calibration: object, mode: str) -> Sequence[object]:
    """Return calibration data that can be gone through more than once.

    Raises:
        DataError: It cannot, or there is none.
    """
    if isinstance(calibration, Sequence) and len(calibration):
        return calibration
    raise DataError(
        f"mode {mode!r} goes through its data several times: pass a list of batches as "
        f"mode_kwargs={{'calibration': batches}}; received {type(calibration).__name__}."
    )


def batches_in_step(batches: Sequence[object]) -> int:
    """Return how many batches make about a thousand tokens."""
    return batches_of(sum(map(_tokens, batches)), len(batches))


def batches_of(rows: int, count: int) -> int:
    """Return how many of ``count`` batches with ``rows`` rows in all make a step."""
    return max(1, min(count, round(_ROWS_IN_A_STEP * count / max(rows, 1))))


def _tokens(batch: object) -> int:
    """Return how many tokens a batch has: the length of its first tensor of ids or features."""
    items: Any = batch.values() if isinstance(batch, Mapping) else batch
    first = batch if isinstance(batch, torch.Tensor) else next(iter(items))
    return int(first.numel() // (first.shape[-1] if first.is_floating_point() else 1))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Keep gradients away from the parameters of a module."""
    switched = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in switched:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in switched:
            parameter.requires_grad_(True)
