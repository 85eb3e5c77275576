# SPDX-License-Identifier: Apache-2.0
"""Statistics of batch norms are those of the data, and whole buffers get those of a subnet."""

from __future__ import annotations

import torch
from torch import nn

from modewright.pruning.norms import norm_statistics, recalibrate_norms, set_norm_statistics


def test_statistics_are_those_of_all_values_together() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    batches = [torch.randn(50, 3) * 2 + 1, torch.randn(50, 3) - 1]
    old = model[0].running_mean
    recalibrate_norms(model, batches)
    values = torch.cat(batches)
    torch.testing.assert_close(model[0].running_mean, values.mean(0))
    torch.testing.assert_close(model[0].running_var, values.var(0, correction=0))
    assert torch.equal(old, torch.zeros(3))
    assert model[0].momentum == 0.1
    assert model.training
    assert model[1].training


def test_without_batches_nothing_happens() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = model[0].running_mean
    recalibrate_norms(model, [])
    assert model[0].running_mean is before


def test_a_subnets_statistics_go_to_their_places() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    small = {"0.running_mean": torch.tensor([5.0, 6.0]), "0.running_var": torch.tensor([7.0, 8.0])}
    kept = {path: {0: torch.tensor([1, 3])} for path in small}
    set_norm_statistics(model, small, kept)
    assert model[0].running_mean.tolist() == [0, 5, 0, 6]
    assert model[0].running_var.tolist() == [1, 7, 1, 8]
    assert set(norm_statistics(model)) == set(small)
