# SPDX-License-Identifier: Apache-2.0
"""Running data through a model: forms of batches, flags, errors."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from modewright.calibration.forward import evaluating, run_calibration
from modewright.errors import DataError


class Recorder(nn.Module):
    """Notes what it is called with, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.drop = nn.Dropout()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.states: list[tuple[bool, bool]] = []

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))
        self.states.append((torch.is_grad_enabled(), self.drop.training))


class Pair(NamedTuple):
    x: torch.Tensor
    flag: bool


class Stream(IterableDataset[torch.Tensor]):
    """Data whose length is not known."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.ones(2), torch.zeros(2)])


X = torch.arange(4.0).reshape(2, 2)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        pytest.param(X, (X,), {}, id="tensor"),
        pytest.param((X, True), (X, True), {}, id="tuple"),
        pytest.param([X, None, "text"], (X, None, "text"), {}, id="list"),
        pytest.param(Pair(X, flag=False), (X, False), {}, id="named tuple"),
        pytest.param({"x": X, "k": 3}, (), {"x": X, "k": 3}, id="dict"),
        pytest.param(UserDict(x=X), (), {"x": X}, id="mapping"),
    ],
)
def test_a_batch_reaches_the_model(
    batch: object, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    model = Recorder()
    assert run_calibration(model, [batch]) == 1
    assert model.calls[0][0] == args
    assert model.calls[0][1] == kwargs


def test_batches_are_run_in_order_and_counted() -> None:
    model = Recorder()
    assert run_calibration(model, [torch.tensor(float(i)) for i in range(3)]) == 3
    assert [call[0][0].item() for call in model.calls] == [0.0, 1.0, 2.0]


def test_a_function_runs_the_model_itself() -> None:
    model = Recorder()
    assert run_calibration(model, lambda m: (m(X), m(X))) == 1
    assert len(model.calls) == 2
    assert model.states == [(False, False)] * 2


def test_the_model_runs_in_eval_mode_without_gradients() -> None:
    model = Recorder().train()
    run_calibration(model, [X])
    assert model.states == [(False, False)]


def test_every_train_flag_is_as_before() -> None:
    model = Recorder().train()
    model.layer.eval()
    run_calibration(model, [X])
    assert (model.training, model.layer.training, model.drop.training) == (True, False, True)


def test_every_train_flag_is_as_before_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[0].eval()
    with pytest.raises(RuntimeError):
        run_calibration(model, [torch.ones(1, 7)])
    assert [m.training for m in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()


def test_evaluating_puts_the_mode_back() -> None:
    model = nn.Sequential(nn.Dropout()).train()
    with evaluating(model):
        assert not model.training
        assert not model[0].training
    assert model.training
    assert model[0].training


@pytest.mark.parametrize(
    ("data", "totals"),
    [
        pytest.param([X, X], [2, 2], id="list"),
        pytest.param((X for _ in range(2)), [None, None], id="generator"),
        pytest.param(DataLoader([X, X], batch_size=1), [2, 2], id="loader"),  # type: ignore[arg-type]
        pytest.param(DataLoader(Stream()), [None, None], id="loader of unknown length"),
    ],
)
def test_progress_is_told_after_each_batch(data: object, totals: list[int | None]) -> None:
    model, seen = Recorder(), []
    run_calibration(
        model, data, on_batch=lambda n, total: seen.append((n, total, len(model.calls)))
    )
    assert seen == [(1, totals[0], 1), (2, totals[1], 2)]


@pytest.mark.parametrize("empty", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_batches_is_an_error_that_explains_iterators(empty: object) -> None:
    with pytest.raises(DataError, match=r"no batches.*pass a list"):
        run_calibration(Recorder(), empty)


def test_a_generator_that_is_used_up_is_an_error() -> None:
    model, data = Recorder(), (X for _ in range(2))
    assert run_calibration(model, data) == 2
    with pytest.raises(DataError, match="empty after its first use"):
        run_calibration(model, data)


@pytest.mark.parametrize("batch", ["text", 3, None, {1, 2}], ids=["str", "int", "None", "set"])
def test_a_batch_of_another_form_is_an_error_that_numbers_it(batch: object) -> None:
    with pytest.raises(DataError, match=f"Batch 2 is a {type(batch).__name__}"):
        run_calibration(Recorder(), [X, batch])


@pytest.mark.parametrize("data", [3, None, 1.5], ids=str)
def test_data_that_cannot_be_iterated_is_an_error(data: object) -> None:
    with pytest.raises(DataError, match=f"received {type(data).__name__}"):
        run_calibration(Recorder(), data)


def test_tensors_are_moved_to_the_device_of_the_model() -> None:
    model = Recorder().to("meta")
    run_calibration(model, [X, (X, 1), {"x": X}])
    (first, _), (second, _), (_, third) = model.calls
    assert [t.device.type for t in (first[0], second[0], third["x"])] == ["meta"] * 3


def test_a_model_without_parameters_gets_its_data_as_it_is() -> None:
    model = nn.Identity()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    run_calibration(model, [X])
    assert seen[0] is X
