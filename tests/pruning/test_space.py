# SPDX-License-Identifier: Apache-2.0
"""A network whose search space is open runs subnets and keeps its weights."""

from __future__ import annotations

import torch

from modewright.pruning.graph import trace_dimensions
from modewright.pruning.space import (
    SearchSpace,
    choose,
    chosen,
    close_space,
    is_elastic,
    open_space,
)
from modewright.pruning.surgery import keep
from support.prunable_networks import build


def opened(name: str = "residual"):
    model, example = build(name)
    groups = trace_dimensions(model, example).groups
    kept = {group.name: list(range(0, group.size, 2)) for group in groups}
    open_space(model)
    return model, example, groups, kept


def test_an_open_space_changes_nothing() -> None:
    plain, example = build("residual")
    model, *_ = opened()
    assert torch.equal(model(example), plain(example))
    assert isinstance(model, type(plain))
    assert type(model).__qualname__ == type(plain).__qualname__


def test_a_chosen_subnet_computes_what_the_cut_network_computes() -> None:
    for name in ("residual", "dense", "mobile", "grouped", "next", "fused_attention", "experts"):
        model, example, groups, kept = opened(name)
        kept = {g.name: kept[g.name][: max(g.minimum, len(kept[g.name]))] for g in groups}
        choose(model, groups, kept)
        small, _ = build(name)
        keep(small, groups, kept)
        assert torch.equal(model(example), small(example)), name


def test_running_a_subnet_leaves_all_weights() -> None:
    model, example, groups, kept = opened()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    choose(model, groups, kept)
    model(example)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert model.stem.out_channels == 16


def test_gradients_reach_the_chosen_units_only() -> None:
    model, example, groups, kept = opened()
    choose(model, groups, kept)
    model(example).square().sum().backward()
    touched = model.stem.weight.grad.flatten(1).abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == kept["stem"]


def test_statistics_of_norms_come_home() -> None:
    model, example, groups, kept = opened()
    before = model.norm.running_mean.clone()
    choose(model, groups, kept)
    model.train()
    model(example)
    changed = model.norm.running_mean != before
    assert changed.nonzero().flatten().tolist() == kept["stem"]


def test_a_choice_is_plain_data() -> None:
    model, example, groups, kept = opened()
    choose(model, groups, kept, {"head": "it is an output"})
    other, _ = build("residual")
    open_space(other, SearchSpace.from_data(chosen(model).to_data()))
    assert torch.equal(other(example), model(example))
    assert chosen(other).untraced == {"head": "it is an output"}


def test_a_closed_space_leaves_the_plain_network() -> None:
    model, example, groups, kept = opened()
    choose(model, groups, kept)
    assert close_space(model).kept == kept
    plain, _ = build("residual")
    assert not is_elastic(model)
    assert type(model) is type(plain)
    assert torch.equal(model(example), plain(example))
