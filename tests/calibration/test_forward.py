# SPDX-License-Identifier: Apache-2.0
"""Running calibration data through a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from modewright.calibration.forward import run_calibration
from modewright.errors import DataError


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, a: torch.Tensor, b: float = 0.0) -> torch.Tensor:
        self.seen.append((float(a.sum()), b, self.training, torch.is_grad_enabled()))
        return a * self.weight


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("calibration", "seen"),
    [
        ([ONE, 2 * ONE], [(1.0, 0.0), (2.0, 0.0)]),
        ([(ONE, 3.0), [ONE, 4.0]], [(1.0, 3.0), (1.0, 4.0)]),
        ([{"a": ONE, "b": 5.0}], [(1.0, 5.0)]),
        ((ONE * i for i in range(2)), [(0.0, 0.0), (1.0, 0.0)]),
        (lambda model: model(ONE, 6.0), [(1.0, 6.0)]),
    ],
    ids=["tensors", "tuples", "dicts", "generator", "function"],
)
def test_every_form_of_data(calibration: object, seen: list[tuple[float, float]]) -> None:
    model = Recorder()

    count = run_calibration(model, calibration)

    assert count == len(seen)
    assert [entry[:2] for entry in model.seen] == seen
    assert all(entry[2:] == (False, False) for entry in model.seen)  # eval mode, no gradients


@pytest.mark.parametrize("fails", [False, True])
def test_train_flags_are_put_back(fails: bool) -> None:
    model = Recorder()
    model.inner.eval()

    def run(module: nn.Module) -> None:
        if fails:
            raise RuntimeError("broken")

    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            run_calibration(model, run)
    else:
        run_calibration(model, run)

    assert model.training
    assert not model.inner.training


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ([], "holds no batches"),
        (3, "iterable of batches or a function"),
        (["text"], "Batch 1 is a str"),
        ([ONE, None], "Batch 2 is a NoneType"),
    ],
    ids=["empty", "number", "text", "none"],
)
def test_unusable_data_is_said(calibration: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        run_calibration(Recorder(), calibration)


def test_progress_is_told_with_the_number_of_batches_where_it_is_known() -> None:
    told: list[tuple[int, int | None]] = []

    run_calibration(Recorder(), [ONE, ONE], on_batch=lambda *now: told.append(now))
    run_calibration(Recorder(), iter([ONE]), on_batch=lambda *now: told.append(now))

    assert told == [(1, 2), (2, 2), (1, None)]
