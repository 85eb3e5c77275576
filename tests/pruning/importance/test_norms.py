# SPDX-License-Identifier: Apache-2.0
"""Importance by what batch norms remember, and what is made up for when units go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import ConfigError, DataError
from modewright.pruning.graph import trace_dimensions
from modewright.pruning.importance.norms import norm_input_means, remembered_costs

X = torch.zeros(2, 3, 8, 8)


def network(between: nn.Module | None = None) -> nn.Sequential:
    """Two norms with statistics and scales of their own, and a layer of 1 by 1 between them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            between or nn.Identity(),
            nn.Conv2d(12, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.Flatten(),
            nn.Linear(6 * 64, 5),
        )
        for norm in (model[1], model[4]):
            nn.init.uniform_(norm.weight, -2, 2)
            nn.init.uniform_(norm.bias, -1, 1)
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


def test_costs_are_the_scales_of_norms_times_the_weights_behind_them() -> None:
    model = network()
    (group, *_) = trace_dimensions(model, X).groups

    costs = remembered_costs(model, [group], X)[group.name]

    expected = model[1].weight.square() * model[3].weight.square().sum((0, 2, 3))
    assert costs.sum() == pytest.approx(1.0)
    torch.testing.assert_close(costs, (expected / expected.sum()).detach(), rtol=0.15, atol=0)


def test_what_an_activation_cuts_off_counts_for_nothing() -> None:
    model = network(nn.ReLU())
    nn.init.constant_(model[1].bias, -20.0)
    model[1].bias.data[4] = 1.0
    (group, *_) = trace_dimensions(model, X).groups

    costs = remembered_costs(model, [group], X)[group.name]

    assert costs[4] == pytest.approx(1.0)


def test_means_that_come_in_are_those_that_norms_put_out() -> None:
    model = network()

    means = norm_input_means(model, X, {})["4"]

    expected = model[3].weight.sum((2, 3)) @ model[1].bias
    torch.testing.assert_close(means, expected.detach(), rtol=0, atol=0.25)
    assert torch.equal(means, norm_input_means(model, X, {})["4"])


def test_units_that_never_vary_go_first_and_are_made_up_for_exactly() -> None:
    model, image = network(nn.ReLU()), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model[1].weight[[2, 5, 7]] = 0.0
        model[1].bias[[2, 5, 7]] = 3.0  # constant, and far from nothing
    before = model(image)

    of_three = 3 * (27 + 2 + 6)  # weights of the first layer, of the norm, of the next layer

    result = modewright.search(
        model,
        ("gradnas", {"divisor": 1, "ignore": ["3"]}),
        {"params": sum(p.numel() for p in model.parameters()) - of_three},
        dummy_input=X,
        config={"importance": "norms", "rounds": 1},
    )
    kept = result.best["kept"]
    pruned = modewright.apply_mode(result.model, "export_prune")

    assert kept["0"] == [u for u in range(12) if u not in (2, 5, 7)]
    assert pruned[0].out_channels == 9
    torch.testing.assert_close(pruned(image), before, rtol=1e-4, atol=1e-4)


def test_a_network_without_norms_remembers_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(DataError, match="no batch norms"):
        modewright.search(
            model,
            "gradnas",
            {"params": "60%"},
            dummy_input=torch.zeros(1, 4),
            config={"importance": "norms"},
        )


def test_an_importance_that_is_not_known_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'gradient' or 'norms'"):
        modewright.search(
            network(), "gradnas", {"params": "60%"}, dummy_input=X, config={"importance": "taylor"}
        )
