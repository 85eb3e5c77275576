# SPDX-License-Identifier: Apache-2.0
"""The groups that are found are those that hang together, and cutting them is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from modewright.errors import DataError
from modewright.evaluation.cost import call_model
from modewright.pruning.graph import DimensionGroup, trace_dimensions
from modewright.pruning.surgery import keep, silence
from support.prunable_networks import NETWORKS, build
from support.prunable_transformers import TRANSFORMERS, build_transformer

CASES = [*NETWORKS, *TRANSFORMERS]
EXPECTED = {
    "residual": {"stem": 16, "first.0": 16, "second.0": 24, "second.3": 24},
    "dense": {"a": 8, "b": 12, "c": 16, "hidden": 32},
    "mobile": {"stem": 16, "wide.0": 32, "squeeze": 8},
    "grouped": {"stem": 4, "grouped": 2, "up": 16},
    "next": {"scale": 16, "up": 48},
    "fused_attention": {"embed": 32, "qkv": 4},
    "gated": {"up": 20, "down": 12},
    "experts": {"gate": 4, **{f"experts.{i}.0": 10 for i in range(4)}},
    "recurrent": {"inner.0": 16},
}
KINDS = {
    "llama": {"hidden": 1, "heads": 2, "ffn": 2},
    "llama_tied": {"hidden": 1, "heads": 2, "ffn": 2},
    "mixtral": {"hidden": 1, "heads": 2, "ffn": 2, "experts": 2},
    "gpt2": {"hidden": 1, "heads": 2, "ffn": 2},
    "bert": {"heads": 2, "ffn": 2},
    "vit": {"hidden": 1, "heads": 2, "ffn": 2},
}


def network(name: str) -> tuple[nn.Module, Any]:
    return build(name) if name in NETWORKS else build_transformer(name)


def output(model: nn.Module, example: Any) -> torch.Tensor:
    with torch.no_grad():
        found = call_model(model, example)
    return found if isinstance(found, torch.Tensor) else found[0]


def some_units(group: DimensionGroup, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    count = max(group.minimum, group.size // 2)
    count = max(group.multiple, count // group.multiple * group.multiple)
    return sorted(torch.randperm(group.size, generator=generator)[:count].tolist())


@pytest.mark.parametrize("name", EXPECTED)
def test_the_groups_of_small_networks_are_known(name: str) -> None:
    graph = trace_dimensions(*network(name))
    assert {group.name: group.size for group in graph.groups} == EXPECTED[name]


@pytest.mark.parametrize("name", KINDS)
def test_transformers_have_the_dimensions_that_they_have(name: str) -> None:
    graph = trace_dimensions(*network(name))
    counts: dict[str, int] = {}
    for group in graph.groups:
        counts[group.kind] = counts.get(group.kind, 0) + 1
    assert counts == KINDS[name]


@pytest.mark.parametrize("name", CASES)
def test_cutting_half_of_every_group_leaves_a_network_that_runs(name: str) -> None:
    model, example = network(name)
    graph = trace_dimensions(model, example)
    before, shape = sum(p.numel() for p in model.parameters()), output(model, example).shape
    keep(model, graph.groups, {group.name: some_units(group, 3) for group in graph.groups})
    result = output(model, example)
    assert result.shape == shape
    assert result.isfinite().all()
    assert sum(p.numel() for p in model.parameters()) < 0.9 * before


@pytest.mark.parametrize("name", CASES)
def test_units_that_nothing_takes_in_are_cut_without_a_trace(name: str) -> None:
    model, example = network(name)
    for group in trace_dimensions(model, example).groups:
        if not group.exact:
            continue  # a norm or a softmax runs over it, and sees how wide it is
        model, example = network(name)
        kept = {group.name: some_units(group, 5)}
        silence(model, [group], kept)
        expected = output(model, example)
        keep(model, [group], kept)
        torch.testing.assert_close(output(model, example), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_tracing_leaves_the_network_as_it_was(name: str) -> None:
    model, example = network(name)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    trace_dimensions(model, example)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_shapes_say_the_same_as_a_layers_own_numbers(name: str) -> None:
    model, example = network(name)
    graph = trace_dimensions(model, example)
    keep(model, graph.groups, {group.name: some_units(group, 9) for group in graph.groups})
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups)
            assert tuple(module.weight.shape[:2]) == shape
        if isinstance(module, nn.BatchNorm2d):
            assert len(module.running_mean) == module.num_features


def test_the_residual_stream_of_llama_is_cut_exactly_where_norms_allow_for_its_width() -> None:
    model, example = build_transformer("llama")
    graph = trace_dimensions(model, example)
    (group,) = (group for group in graph.groups if group.kind == "hidden")
    kept = some_units(group, 7)
    gone = [unit for unit in range(group.size) if unit not in kept]
    part = len(kept) / group.size
    with torch.no_grad():
        for piece in group.producers:
            model.get_parameter(piece.tensor).index_fill_(piece.axis, torch.tensor(gone), 0)
    small, _ = build_transformer("llama")
    small.load_state_dict(model.state_dict())
    keep(small, [group], {group.name: kept})
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":  # a mean over more units is a smaller one
            module.weight.data *= part**0.5
            module.variance_epsilon *= part
    torch.testing.assert_close(output(small, example), output(model, example))


def test_tied_tensors_stay_tied() -> None:
    model, example = build_transformer("llama_tied")
    graph = trace_dimensions(model, example)
    keep(model, graph.groups, {group.name: some_units(group, 3) for group in graph.groups})
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_heads_go_with_the_queries_that_share_them() -> None:
    model, example = build_transformer("llama")  # four heads of eight, in pairs
    group = trace_dimensions(model, example)["model.layers.0.self_attn.q_proj"]
    queries, keys, *_ = group.slices
    assert queries.indices.tolist() == [list(range(16)), list(range(16, 32))]
    assert keys.indices.tolist() == [list(range(8)), list(range(8, 16))]


def test_what_is_left_alone_is_named_with_the_reason() -> None:
    graph = trace_dimensions(*build("recurrent"))
    assert set(graph.untraced) >= {"inner.2", "memory", "head"}
    assert graph.untraced["head"] == "it is an output of the network"


def test_an_operation_without_a_rule_freezes_what_goes_in() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.cummax(self.a(x), dim=-1).values)

    graph = trace_dimensions(Sorted(), torch.randn(2, 4))
    assert graph.groups == ()
    assert "aten.cummax" in graph.untraced["a"]


def test_a_group_whose_cut_would_be_wrong_is_left_alone() -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)[..., :8].view(2, 8)) + self.d(self.c(x))

    graph = trace_dimensions(Numbered(), torch.randn(2, 4))
    assert [group.name for group in graph.groups] == ["c"]
    assert "does not run" in graph.untraced["a"]


def test_a_module_that_the_example_does_not_reach_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    model.unused = nn.Linear(5, 5)
    model.forward = lambda x: model[1](model[0](x))
    graph = trace_dimensions(model, torch.randn(2, 4))
    assert graph.untraced["unused"] == "the example input does not reach it"


def test_a_network_without_tensors_as_output_cannot_be_traced() -> None:
    class Silent(nn.Linear):
        def forward(self, x: torch.Tensor) -> None:
            super().forward(x)

    with pytest.raises(DataError, match="no tensor"):
        trace_dimensions(Silent(2, 2), torch.randn(1, 2))
