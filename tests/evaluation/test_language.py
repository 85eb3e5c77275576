# SPDX-License-Identifier: Apache-2.0
"""Loss, perplexity and divergence against independent computations."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from modewright.errors import DataError
from modewright.evaluation import language
from modewright.evaluation.language import (
    LanguageQuality,
    evaluate_language,
    kl_divergence,
    reference_log_probs,
)

VOCAB = 13


class TinyModel(nn.Module):
    """Predicts from the present token alone; ``form`` says how the logits are returned."""

    def __init__(self, seed: int = 0, form: str = "tensor") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCAB, 8)
            self.dropout = nn.Dropout(0.5)
            self.head = nn.Linear(8, VOCAB)
        self.form = form
        self.batches: list[tuple[int, ...]] = []

    def forward(self, ids: torch.Tensor) -> Any:
        self.batches.append(tuple(ids.shape))
        logits = self.head(self.dropout(self.embedding(ids)))
        if self.form == "tuple":
            return logits, "something else"
        return SimpleNamespace(logits=logits) if self.form == "logits" else logits


class FixedModel(nn.Module):
    """Returns the same given logits ``[length, vocab]`` whatever it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits[None]


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", ["tensor", "tuple", "logits"])
@pytest.mark.parametrize("chunk_bytes", [1, 3 * VOCAB * 4, 2**20])
def test_loss_agrees_with_cross_entropy(
    form: str, chunk_bytes: int, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "_CHUNK_BYTES", chunk_bytes)
    model = TinyModel(form=form)

    quality = evaluate_language(model, windows)

    logits = TinyModel().eval()(windows).detach()
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert quality.loss == pytest.approx(float(expected), rel=1e-6)
    assert quality.tokens == 5 * 8
    assert quality.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-5)
    assert model.batches == [(1, 9)] * 5


def test_loss_by_hand() -> None:
    # After token 0 the model gives 3/4 to token 1; after token 1 it gives 1/4 to token 0.
    probabilities = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]])

    quality = evaluate_language(FixedModel(probabilities.log()), torch.tensor([[0, 1, 0]]))

    assert quality.loss == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2, rel=1e-6)
    assert quality.tokens == 2


def test_low_precision_logits_are_summed_in_float32(windows: torch.Tensor) -> None:
    model = TinyModel().to(torch.bfloat16)

    quality = evaluate_language(model, windows)

    logits = model.eval()(windows).detach().float()
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert quality.loss == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("value", "check"), [(math.nan, math.isnan), (-math.inf, math.isinf)])
def test_what_is_not_finite_is_reported(value: float, check: Any) -> None:
    logits = torch.zeros(3, 2)
    logits[1, 0] = value

    quality = evaluate_language(FixedModel(logits), torch.tensor([[0, 1, 0]]))

    assert check(quality.loss)
    assert check(quality.perplexity)


def test_perplexity_does_not_overflow() -> None:
    assert LanguageQuality(loss=1e4, tokens=1).perplexity == math.inf
    assert LanguageQuality(loss=0.0, tokens=1).perplexity == 1.0


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_come_back(fails: bool, windows: torch.Tensor) -> None:
    model = TinyModel().train()
    model.embedding.eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen: list[bool] = []
    model.head.register_forward_hook(lambda module, *_: seen.append(model.dropout.training))

    if fails:
        with pytest.raises(IndexError):
            evaluate_language(model, windows + VOCAB)
    else:
        evaluate_language(model, windows)
        assert seen == [False] * 5

    assert {name: module.training for name, module in model.named_modules()} == before


def test_flags_of_an_evaluating_model_with_a_training_part_come_back(
    windows: torch.Tensor,
) -> None:
    model = TinyModel().eval()
    model.dropout.train()

    kl_divergence(reference_log_probs(model, windows), model, windows)

    assert not model.training
    assert model.dropout.training


def test_progress_and_gradients(windows: torch.Tensor) -> None:
    model, steps = TinyModel(), []
    model.head.register_forward_hook(lambda *_: steps.append(torch.is_grad_enabled()))

    done: list[tuple[int, int]] = []
    evaluate_language(model, windows, on_window=lambda i, n: done.append((i, n)))

    assert done == [(i, 5) for i in range(1, 6)]
    assert steps == [False] * 5
    assert torch.is_grad_enabled()


def test_divergence_agrees_with_torch(windows: torch.Tensor) -> None:
    first, second = TinyModel(0), TinyModel(1)

    reference = reference_log_probs(first, windows)
    divergence = kl_divergence(reference, second, windows)

    logs = [
        torch.log_softmax(m.eval()(windows).detach().double(), -1).flatten(0, 1)
        for m in (first, second)
    ]
    expected = functional.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
    assert reference.dtype == torch.float32
    assert reference.shape == (5, 9, VOCAB)
    assert divergence == pytest.approx(float(expected), rel=1e-5)
    assert kl_divergence(reference, first, windows) == 0.0


def test_divergence_by_hand() -> None:
    window = torch.tensor([[0]])
    reference = torch.tensor([[[0.5, 0.5, 0.0]]]).log()
    model = FixedModel(torch.tensor([[0.25, 0.75, 0.0]]).log())

    divergence = kl_divergence(reference, model, window)

    assert divergence == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    ruled_out = FixedModel(torch.tensor([[1.0, 0.0, 0.0]]).log())
    assert kl_divergence(reference, ruled_out, window) == math.inf
    assert math.isnan(kl_divergence(reference, FixedModel(torch.full((1, 3), math.nan)), window))


def test_reference_keeps_to_its_memory(windows: torch.Tensor) -> None:
    model, one = TinyModel(), 9 * VOCAB * 4

    assert len(reference_log_probs(model, windows, max_bytes=1)) == 1
    assert len(reference_log_probs(model, windows, max_bytes=3 * one + 1)) == 3
    assert len(reference_log_probs(model, windows, max_bytes=100 * one)) == 5

    reference = reference_log_probs(model, windows, max_bytes=2 * one)
    model.batches.clear()
    assert kl_divergence(reference, model, windows) == 0.0
    assert len(model.batches) == 2


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(3, 4),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.zeros(2, 1, dtype=torch.int64),
        torch.full((2, 4), -1),
    ],
)
def test_bad_windows_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(DataError, match="windows: "):
        evaluate_language(TinyModel(), bad)


def test_bad_outputs_are_refused(windows: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"FixedModel: expected logits .* got \[1, 2, 5\]"):
        evaluate_language(FixedModel(torch.zeros(2, 5)), windows)
    with pytest.raises(DataError, match=r"Identity: expected logits"):
        evaluate_language(nn.Identity(), windows)
    with pytest.raises(DataError, match="tokenizer"):
        evaluate_language(FixedModel(torch.zeros(9, 2)), windows)


def test_a_reference_of_another_shape_is_refused(windows: torch.Tensor) -> None:
    model = TinyModel()
    reference = reference_log_probs(model, windows)

    with pytest.raises(DataError, match="first k of 4 windows"):
        kl_divergence(reference, model, windows[:4])
    with pytest.raises(DataError, match="same windows"):
        kl_divergence(reference, model, windows[:, :5])
    with pytest.raises(DataError, match="same vocabulary"):
        kl_divergence(reference[..., :-1], model, windows)
