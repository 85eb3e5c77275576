# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modewright.errors import DataError
from modewright.pruning import effect as effect_module
from modewright.pruning.effect import Effect, some_batches
from support.models import LM, MLP


class Logits(nn.Module):
    """Puts its logits out as Transformers models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LM.make()

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inner(ids))


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    return model


def test_divergence_equals_that_of_torch() -> None:
    model = Logits()
    before = model(LM.inputs).logits.log_softmax(-1)
    effect = Effect(model, [LM.inputs])
    assert effect(model) == 0.0

    changed(model)
    after = model(LM.inputs).logits.log_softmax(-1)
    expected = nn.functional.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean()
    assert effect(model) == pytest.approx(float(expected), rel=1e-5)


def test_divergence_is_that_of_some_tokens_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(effect_module, "_REFERENCE_BYTES", 4 * 20 * 6)  # six of twelve tokens
    model = Logits()
    before = model(LM.inputs).logits.flatten(0, 1)[::2].log_softmax(-1)
    effect = Effect(model, [LM.inputs])
    changed(model)
    after = model(LM.inputs).logits.flatten(0, 1)[::2].log_softmax(-1)

    expected = nn.functional.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean()
    assert effect(model) == pytest.approx(float(expected), rel=1e-5)


def test_outputs_that_are_no_logits_are_compared_by_their_squares() -> None:
    model = MLP.make()
    before = MLP.run(model)
    effect = Effect(model, [MLP.inputs])
    changed(model)

    expected = (MLP.run(model) - before).square().mean() / before.square().mean()
    assert effect(model) == pytest.approx(float(expected), rel=1e-5)


def test_there_must_be_batches() -> None:
    with pytest.raises(DataError, match="pass calibration="):
        Effect(MLP.make(), [])
    with pytest.raises(DataError, match="iterable of batches"):
        some_batches(lambda model: None, 3)


def test_batches_are_spread_over_the_data() -> None:
    assert some_batches(range(10), 3) == [0, 3, 6]
    assert some_batches(range(2), 3) == [0, 1]
    assert some_batches(None, 3) == []
