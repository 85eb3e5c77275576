# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import ApplyModeError
from modewright.pruning.effect import Effect
from modewright.pruning.graph import trace_dimensions
from modewright.pruning.refit.solve import Moments, solve
from modewright.pruning.space import choose
from support.models import GatedBlock
from support.prunable_lms import batches, lm, logits

DATA, OTHER = batches(16, 48), batches(20, 48)[16:]


class Scaled(nn.Module):
    """Blocks that add their layers' outputs to the stream times a factor."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = factor
        self.blocks = nn.ModuleList([ScaledBlock(8, 16, factor) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ScaledBlock(GatedBlock):
    def __init__(self, features: int, hidden: int, factor: float) -> None:
        super().__init__(features, hidden)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.factor * (super().forward(x) - x)


def stack() -> tuple[Scaled, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Scaled().eval(), list(torch.randn(12, 40, 8))


def refitted(model: nn.Module, data: Any) -> nn.Module:
    return modewright.apply_mode(model, "refit", mode_kwargs={"calibration": data})


def cut_inner(model: nn.Module, example: Any, gone: list[int]) -> nn.Module:
    """Choose a subnet whose blocks lack some inner units."""
    model = modewright.apply_mode(model, ("minitron", {"divisor": 1}))
    graph = trace_dimensions(model, example)
    groups = [group for group in graph.groups if group.kind == "ffn"]
    kept = {g.name: [u for u in range(g.size) if u not in gone] for g in groups}
    choose(model, groups, kept)
    return model


def test_units_that_others_can_stand_in_for_are_made_up_for_entirely() -> None:
    model, data = stack()
    with torch.no_grad():
        for block in model.blocks:  # units 3 and 7 compute the same
            for layer in (block.gate, block.up):
                layer.weight[7] = layer.weight[3]
            block.gate.bias[7] = block.gate.bias[3]
    expected = model(data[0])
    pruned = cut_inner(model, data[0], [7])
    before = (pruned(data[0]) - expected).norm()
    refitted(pruned, data)

    assert (pruned(data[0]) - expected).norm() < 0.02 * before


@pytest.mark.parametrize("gone", [[1], [0, 5, 9]])
def test_outputs_on_other_data_are_nearer_to_the_whole_network(gone: list[int]) -> None:
    model, data = stack()
    other = torch.randn(40, 8)
    expected = model(other)
    pruned = cut_inner(model, data[0], gone)
    before = (pruned(other) - expected).norm()
    refitted(pruned, data)

    assert (pruned(other) - expected).norm() < 0.8 * before


@pytest.mark.parametrize("dropped", [[1], [3], [2, 3]])
def test_blocks_before_and_behind_make_up_for_dropped_ones(dropped: list[int]) -> None:
    model: Any = modewright.apply_mode(lm("llama"), "depth")
    effect = Effect(model, OTHER)
    for place in dropped:
        model.model.layers[place].skipped = True
    before = effect(model)
    refitted(model, DATA)

    assert effect(model) < 0.95 * before


def test_what_is_exported_computes_what_was_refitted() -> None:
    model = cut_inner(lm("llama"), DATA[0], list(range(40)))
    refitted(model, DATA)
    expected = logits(model, DATA[0])

    torch.testing.assert_close(
        logits(modewright.apply_mode(model, "export_prune"), DATA[0]), expected
    )


def test_units_that_are_cut_keep_their_weights() -> None:
    model: Any = cut_inner(lm("llama"), DATA[0], [2, 4])
    layer = model.model.layers[0].mlp.down_proj
    before = layer.weight.detach().clone()
    refitted(model, DATA)

    assert torch.equal(layer.weight[:, [2, 4]], before[:, [2, 4]])
    assert not torch.equal(layer.weight[:, 3], before[:, 3])


def test_a_whole_network_stays_nearly_as_it_is() -> None:
    model = modewright.apply_mode(lm("llama"), "depth")
    expected = logits(model, OTHER[0])
    refitted(model, DATA)

    torch.testing.assert_close(logits(model, OTHER[0]), expected, rtol=1e-3, atol=1e-3)


def test_the_record_says_what_was_solved() -> None:
    model, data = stack()
    pruned = refitted(cut_inner(model, data[0], [1, 2]), data)
    metadata = modewright.mode_state(pruned)["modes"][-1]["metadata"]

    assert list(metadata["blocks"]) == ["blocks.0", "blocks.1", "blocks.2"]
    for found in metadata["blocks"].values():
        assert found["down"]["error"] < found["down"]["error_before"]
    assert metadata["skipped"] == []


def test_a_block_that_does_not_add_to_a_stream_is_named() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3)]
    model = modewright.apply_mode(nn.Sequential(*layers).eval(), "depth")
    refitted(model, [torch.randn(5, 4)])
    skipped = modewright.mode_state(model)["modes"][-1]["metadata"]["skipped"]

    assert [item["module"] for item in skipped] == ["0", "1", "2"]


def test_data_is_needed_and_a_failure_leaves_the_model_as_it_was() -> None:
    model = cut_inner(lm("llama"), DATA[0], [1])
    expected = logits(model, DATA[0])
    with pytest.raises(ApplyModeError, match="needs data"):
        modewright.apply_mode(model, "refit")
    with pytest.raises(ApplyModeError):
        refitted(model, [DATA[0], {"input_ids": "no tokens"}])

    assert torch.equal(logits(model, DATA[0]), expected)


def test_a_cut_stream_is_refused() -> None:
    model = modewright.apply_mode(lm("llama"), ("minitron", {"kinds": ["hidden"]}))
    graph = trace_dimensions(model, DATA[0])
    (hidden,) = [group for group in graph.groups if group.kind == "hidden"]
    choose(model, [hidden], {hidden.name: range(24)})
    with pytest.raises(ApplyModeError, match="of a Embedding was cut"):
        refitted(model, DATA)


def test_the_damping_is_the_best_one_on_data_that_was_held_back() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 12, generator=generator)

    def moments(rows: int) -> Moments:
        x = torch.randn(rows, 12, generator=generator)
        noise = torch.randn(rows, 3, generator=generator)
        return Moments.of(x, x @ truth.t() + 3 * noise)

    own = truth + 1
    few, held, plenty = moments(14), moments(4000), moments(4000)

    assert held.error(solve(own, few, held)[0]) < held.error(own)
    assert solve(own, plenty, held)[1] < 1.0
    assert solve(truth, few, held)[1] in (0.0, 30.0)  # nothing to gain


def test_moments_give_the_error_of_any_weight() -> None:
    x, target = torch.randn(30, 4), torch.randn(30, 3)
    weight = torch.randn(3, 4)
    moments = Moments.of(x[:10], target[:10]) + Moments.of(x[10:], target[10:])

    expected = (x @ weight.t() - target).square().sum() / target.square().sum()
    assert math.isclose(moments.error(weight), float(expected), rel_tol=1e-4)
