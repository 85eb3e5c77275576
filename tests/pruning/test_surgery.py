# SPDX-License-Identifier: Apache-2.0
"""Cuts are plain data, change no tensor in place, and refuse what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modewright.errors import ConfigError
from modewright.modes.codec import dumps, join_tensors, split_tensors
from modewright.pruning.graph import trace_dimensions
from modewright.pruning.surgery import CutPlan, cut, keep, plan_cut, trial_cut
from support.prunable_networks import build

HALF = {"stem": list(range(0, 16, 2)), "first.0": [3], "second.3": list(range(12))}


def test_a_plan_survives_being_written_down() -> None:
    model, example = build("residual")
    plan = plan_cut(model, trace_dimensions(model, example).groups, HALF)
    data, tensors = split_tensors(plan.to_data(), "plan")
    dumps(data)  # JSON
    again = CutPlan.from_data(join_tensors(data, tensors, "plan", error=ValueError))
    other, _ = build("residual")
    cut(model, plan)
    cut(other, again)
    assert torch.equal(model(example), other(example))


def test_tensors_are_the_chosen_parts_of_what_they_were() -> None:
    model, example = build("residual")
    whole, _ = build("residual")
    keep(model, trace_dimensions(model, example).groups, HALF)
    assert torch.equal(model.stem.weight, whole.stem.weight[::2])
    assert torch.equal(model.first[0].weight, whole.first[0].weight[[3]][:, ::2])
    assert torch.equal(model.norm.running_var, whole.norm.running_var[::2])
    assert torch.equal(model.head.weight, whole.head.weight[:, :12])
    assert model.stem.weight.is_contiguous()


def test_a_trial_leaves_every_tensor_where_it_was() -> None:
    model, example = build("mobile")
    groups = trace_dimensions(model, example).groups
    before = model(example)
    tensors = list(model.state_dict(keep_vars=True).values())
    with trial_cut(model, plan_cut(model, groups, {"wide.0": [0, 1, 2]})):
        assert model.deep[0].groups == 3
        assert not torch.equal(model(example), before)
    after = list(model.state_dict(keep_vars=True).values())
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    assert model.deep[0].groups == 32
    assert torch.equal(model(example), before)


def test_frozen_parameters_stay_frozen() -> None:
    model, example = build("residual")
    model.stem.weight.requires_grad_(False)
    keep(model, trace_dimensions(model, example).groups, HALF)
    assert not model.stem.weight.requires_grad
    assert model.head.weight.requires_grad


def test_a_norm_without_parameters_knows_its_width() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 2, 1)
    ).eval()
    example = torch.randn(1, 3, 4, 4)
    keep(model, trace_dimensions(model, example).groups, {"0": [1, 2, 5]})
    assert model[1].num_features == 3
    assert model(example).shape == (1, 2, 4, 4)


@pytest.mark.parametrize("units", [[], [3, 2], [1, 1], [-1, 2], [0, 16]])
def test_units_that_do_not_exist_are_refused(units: list[int]) -> None:
    model, example = build("residual")
    groups = trace_dimensions(model, example).groups
    with pytest.raises(ConfigError, match="rising numbers from 0 to 15"):
        keep(model, groups, {"stem": units})


def test_an_unknown_group_is_refused() -> None:
    model, example = build("residual")
    with pytest.raises(ConfigError, match="There is no group 'steam'"):
        keep(model, trace_dimensions(model, example).groups, {"steam": [0]})


def test_a_network_is_not_cut_twice_by_one_plan() -> None:
    model, example = build("residual")
    plan = plan_cut(model, trace_dimensions(model, example).groups, HALF)
    cut(model, plan)
    with pytest.raises(ConfigError, match="does not fit"):
        cut(model, plan)
