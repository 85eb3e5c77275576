# SPDX-License-Identifier: Apache-2.0
"""Importance by gradient is the squared gradient of a gate, whichever way that is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modewright.errors import DataError
from modewright.pruning.graph import trace_dimensions
from modewright.pruning.importance.gradient import drawn_label_loss, gradients, single_samples
from support.prunable_networks import build
from support.prunable_transformers import build_transformer


class Gated(nn.Module):
    """A perceptron with a gate on every inner unit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3)
        self.gate: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.up(x))
        return self.down(inner if self.gate is None else inner * self.gate)


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(batch), torch.arange(len(batch)) % 3)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, generator=generator) for _ in range(3)]


def test_it_is_the_squared_gradient_of_a_gate_behind_the_activation() -> None:
    model = Gated()
    (group,) = trace_dimensions(model, batches()[0]).groups
    found = gradients(model, [group], batches(), loss)["up"]
    expected = torch.zeros(12)
    for batch in batches():
        model.gate = torch.ones(12, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(model, batch), model.gate)
        expected += gradient.square() / 3
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "fused_attention"])
def test_it_agrees_with_finite_differences(name: str) -> None:
    model, example = build(name)
    model, example = model.double(), example.double()
    groups = trace_dimensions(model, example).groups

    def measured(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch).square().mean()

    found = gradients(model, groups, [example], measured)
    for group in groups:
        for unit in (0, group.size - 1):
            values = []
            for change in (1e-4, -1e-4):
                other, _ = build(name)
                other = other.double()
                with torch.no_grad():
                    for piece in group.consumers:
                        index = piece.indices[unit]
                        weight = other.get_parameter(piece.tensor)
                        weight.index_copy_(
                            piece.axis, index, weight.index_select(piece.axis, index) * (1 + change)
                        )
                    values.append(float(measured(other, example)))
            slope = (values[0] - values[1]) / 2e-4
            assert found[group.name][unit] == pytest.approx(slope**2, rel=1e-3, abs=1e-12)


def test_a_unit_that_nothing_uses_has_none() -> None:
    model = Gated()
    with torch.no_grad():
        model.down.weight[:, 4] = 0
    (group,) = trace_dimensions(model, batches()[0]).groups
    found = gradients(model, [group], batches(), loss)["up"]
    assert found[4] == 0
    assert (found > 0).sum() > 6


def test_experts_have_importance_too() -> None:
    model, example = build_transformer("mixtral")
    groups = [g for g in trace_dimensions(model, example).groups if g.kind == "experts"]
    found = gradients(model, groups, [example])
    assert all((found[group.name] > 0).any() for group in groups)


def test_it_leaves_the_network_as_it_was() -> None:
    model = Gated().train()
    model.up.weight.requires_grad_(False)
    (group,) = trace_dimensions(model, batches()[0]).groups
    gradients(model, [group], batches(), loss)
    assert model.training
    assert not model.up.weight.requires_grad
    assert model.down.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_drawn_labels_are_the_same_at_every_call() -> None:
    model, before = Gated(), torch.random.get_rng_state()
    first, second = (float(drawn_label_loss(model, batches()[0]).detach()) for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_are_cut_into_single_samples() -> None:
    images, labels = torch.arange(12).reshape(3, 4), torch.arange(3)
    found = single_samples([(images, labels), (images, labels)], 4)
    assert [(x.tolist(), y.tolist()) for x, y in found[:2]] == [
        ([[0, 1, 2, 3]], [0]),
        ([[4, 5, 6, 7]], [1]),
    ]
    assert len(found) == 4
    assert single_samples([{"ids": images, "flag": True}], 1)[0]["flag"] is True


def test_without_batches_it_says_what_is_missing() -> None:
    model = Gated()
    (group,) = trace_dimensions(model, batches()[0]).groups
    with pytest.raises(DataError, match="calibration"):
        gradients(model, [group], [], loss)
