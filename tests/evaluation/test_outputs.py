# SPDX-License-Identifier: Apache-2.0
"""Outputs of any network, compared with the original's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modewright.errors import DataError
from modewright.evaluation.outputs import main_output, output_similarity, reference_outputs


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.dropout(self.embedding(ids)))


def test_hidden_states_are_averaged_over_places_without_dropout() -> None:
    model = Encoder().train()
    inputs = torch.tensor([[1, 2, 3], [4, 4, 4]])
    seen: list[tuple[int, int]] = []

    found = reference_outputs(model, inputs, on_window=lambda d, t: seen.append((d, t)))

    table = model.embedding.weight.detach()
    expected = torch.stack([table[[1, 2, 3]].mean(0), table[4]])
    assert torch.allclose(found, expected, atol=1e-6)
    assert seen == [(1, 2), (2, 2)]
    assert model.dropout.training


def test_a_plain_tensor_is_compared_as_a_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = reference_outputs(model, inputs)

    assert reference.shape == (4, 5)
    assert output_similarity(reference, model, inputs) == pytest.approx(1.0)
    assert output_similarity(-reference, model, inputs) == pytest.approx(-1.0)


def test_logits_come_before_hidden_states() -> None:
    both = SimpleNamespace(logits=torch.ones(1, 2), last_hidden_state=torch.zeros(1, 3, 4))
    assert main_output(both, "a test") == (both.logits, True)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(DataError, match="no input"):
        reference_outputs(nn.Linear(2, 2), torch.empty(0, 2))
    with pytest.raises(DataError, match="holds no tensor"):
        main_output(SimpleNamespace(), "a test")
