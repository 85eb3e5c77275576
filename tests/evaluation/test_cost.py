# SPDX-License-Identifier: Apache-2.0
"""What a model costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from modewright.errors import ConfigError, DataError
from modewright.evaluation import cost
from modewright.evaluation.cost import COST_NAMES, measure_cost, measure_latencies
from support.models import LM, MLP, MOE, MixtureBlock


def test_parameters_are_counted_tied_ones_once() -> None:
    assert measure_cost(LM.make(), which=["params"]) == {"params": 20 * 8 + 2 * 8 * 16 + 16 + 8}


def test_size_is_that_of_what_is_stored() -> None:
    model = nn.Sequential(nn.Linear(4, 3).half(), nn.BatchNorm1d(3))
    model.register_buffer("seen", torch.zeros(5, dtype=torch.uint8))
    model.register_buffer("passing", torch.zeros(100), persistent=False)
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())

    assert measure_cost(model, which=["size_bytes"]) == {"size_bytes": stored}
    assert measure_cost(LM.make(), which=["size_bytes"])["size_bytes"] == 4 * (160 + 280)


def test_flops_are_twice_the_multiply_adds() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4))
    per_pixel = 2 * 4 * 9 * 8 * 8 + 4 * 9 * 6 * 6
    assert measure_cost(model, torch.zeros(5, 2, 8, 8), ["flops"]) == {"flops": 5 * 2 * per_pixel}
    linear = 2 * 3 * (8 * 12 * 2 * 2 + 8 * 4)
    assert measure_cost(MLP.make(), MLP.inputs, ["flops"]) == {"flops": linear}


def test_flops_of_attention_are_counted() -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, *, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k)

    q = torch.zeros(1, 2, 6, 8)
    found = measure_cost(Attention(), {"q": q, "k": q}, ["flops"])
    assert found == {"flops": 2 * 2 * (6 * 6 * 8) * 2}


def test_flops_of_grouped_products_are_those_of_the_products_one_by_one() -> None:
    class Experts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ends = torch.tensor([2, 8], dtype=torch.int32)
            return torch._grouped_mm(x, torch.zeros(2, 16, 24, dtype=x.dtype), offs=ends)

    found = measure_cost(Experts(), torch.zeros(8, 16, dtype=torch.bfloat16), ["flops"])
    assert found == {"flops": 2 * 8 * 16 * 24}


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "keywords"]
)
def test_inputs_are_tensors_tuples_or_keywords(wrap: Any) -> None:
    assert measure_cost(MLP.make(), wrap(MLP.inputs), ["flops"])["flops"] > 0


def test_a_model_without_experts_uses_all_its_parameters() -> None:
    found = measure_cost(MLP.make(), which=["params", "active_params"])
    assert found["params"] == found["active_params"]


def test_of_fused_experts_those_count_that_a_token_uses() -> None:
    model = MOE.make()
    for module in model.modules():
        if isinstance(module, MixtureBlock):
            module.top_k = 2
    router, expert, head = 4 * 8, 8 * 20 + 10 * 8, 8 * 3 + 3
    found = measure_cost(model, which=["params", "active_params"])

    assert found["params"] == 2 * (router + 4 * expert) + head
    assert found["active_params"] == 2 * (router + 2 * expert) + head


def test_of_listed_experts_those_count_that_a_token_uses() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 8, bias=False)
            self.experts = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(8)])

    model = nn.Sequential(Routed())
    model.config = type("Config", (), {"num_experts_per_tok": 3})()
    assert measure_cost(model, which=["active_params"]) == {"active_params": 32 + 3 * 16}


def test_experts_of_which_nobody_says_how_many_are_used_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"blocks\.0\.experts.*num_experts_per_tok"):
        measure_cost(MOE.make(), which=["active_params"])


def test_latency_is_the_median_of_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(clock)))
    order: list[str] = []

    found = measure_latencies([lambda: order.append("a"), lambda: order.append("b")], rounds=3)

    assert order == ["a", "b"] * 5
    assert found == [1.0, 1.0]


def test_latency_of_a_model_is_positive_and_leaves_its_flags() -> None:
    model = MLP.make().train()
    assert measure_cost(model, MLP.inputs, ["latency"])["latency"] > 0
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["flops", "latency"])
def test_without_an_input_what_needs_one_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match=f"{name}.*dummy_input"):
        measure_cost(MLP.make(), which=[name])


def test_input_of_another_kind_is_an_error() -> None:
    with pytest.raises(DataError, match=r"int.*tuple"):
        measure_cost(MLP.make(), 3, ["flops"])


def test_unknown_cost_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'flop'.*'flops'"):
        measure_cost(MLP.make(), which=["flop"])
    assert set(measure_cost(MLP.make(), MLP.inputs, COST_NAMES)) == set(COST_NAMES)
