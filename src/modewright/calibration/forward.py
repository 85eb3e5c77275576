# SPDX-License-Identifier: Apache-2.0
"""Running calibration data through a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import length_hint
from typing import Any

import torch
from torch import nn

from modewright.calibration.unit_data import UnitData
from modewright.errors import DataError

OnBatch = Callable[[int, "int | None"], None]


def run_calibration(
    model: nn.Module, calibration: object, *, on_batch: OnBatch | None = None
) -> int:
    """Run data through a model, without gradients and in eval mode.

    Args:
        model: The model; every train flag is put back afterwards.
        calibration: Batches (each a tensor, a tuple or list of positional inputs, or a dict of
            keyword inputs), or a function ``(model) -> None`` that runs the model itself; or a
            :class:`UnitData`, if the model is one unit of a network.
        on_batch: Called after each batch with its number from 1 and the number of all batches, if
            that is known.

    Returns:
        The number of batches; 1 for a function.

    Raises:
        DataError: There are no batches, or one has another form.
    """
    with torch.no_grad(), evaluating(model):
        if isinstance(calibration, UnitData):
            return calibration.run(model)
        if callable(calibration):
            calibration(model)
            return 1
        if not isinstance(calibration, Iterable):
            raise DataError(
                "calibration must be an iterable of batches or a function that runs the model; "
                f"received {type(calibration).__name__}."
            )
        total = length_hint(calibration) or None
        count = 0
        for count, batch in enumerate(calibration, start=1):
            run_batch(model, batch, number=count)
            if on_batch is not None:
                on_batch(count, total)
    if not count:
        raise DataError(
            "calibration holds no batches. An iterator is empty after its first use; pass a list."
        )
    return count


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and each back in the mode it was in."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def run_batch(model: nn.Module, batch: object, *, number: int = 1) -> Any:
    """Run a model on one batch and return what it puts out.

    Args:
        model: The model.
        batch: A tensor, a tuple or list of positional inputs, or a dict of keyword inputs; moved
            to the device of the model's parameters.
        number: The batch's number, for the message.

    Raises:
        DataError: The batch has another form.
    """
    device = next((p.device for p in model.parameters()), None)
    if isinstance(batch, torch.Tensor):
        return model(batch.to(device))
    if isinstance(batch, (tuple, list)):
        return model(*(_moved(item, device) for item in batch))
    if isinstance(batch, Mapping):
        return model(**{key: _moved(item, device) for key, item in batch.items()})
    raise DataError(
        f"Batch {number} is a {type(batch).__name__}; a tensor, a tuple of positional inputs "
        "or a dict of keyword inputs was expected."
    )


def _moved(item: Any, device: torch.device | None) -> Any:
    return item.to(device) if isinstance(item, torch.Tensor) else item
