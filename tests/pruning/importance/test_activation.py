# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from modewright.pruning.graph import trace_dimensions
from modewright.pruning.importance.activation import activation_importance, mean_squares
from modewright.pruning.importance.magnitude import magnitudes
from support.prunable_lms import batches, lm

DATA = batches(3)


def test_mean_squares_are_those_of_all_inputs_of_a_layer() -> None:
    model = lm("llama")
    path = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    found = mean_squares(model, [path], DATA)
    handle.remove()

    expected = torch.cat([x.flatten(0, 1) for x in seen]).square().mean(0)
    torch.testing.assert_close(found[path].float(), expected)


@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_importance_is_what_a_layer_loses_without_the_unit(kind: str) -> None:
    model = lm("llama")
    graph = trace_dimensions(model, DATA[0])
    group = next(g for g in graph.groups if g.kind == kind)
    (piece,) = group.consumers
    layer = model.get_submodule(piece.module)
    inputs: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))

    found = activation_importance(model, [group], DATA)[group.name]

    rows = torch.cat(inputs[: len(DATA)])
    lost = (rows.square()[:, None] * layer.weight.square()).mean(0).sum(0)  # each input by itself
    expected = lost[piece.indices].sum(1) / lost.sum()
    torch.testing.assert_close(found.float(), expected.detach())


def test_a_group_that_no_linear_layer_takes_in_is_judged_by_its_weights() -> None:
    model = lm("gpt2")  # its layers are of another class
    graph = trace_dimensions(model, DATA[0])
    group = next(g for g in graph.groups if g.kind == "ffn")

    found = activation_importance(model, [group], DATA)[group.name]

    torch.testing.assert_close(found.float(), magnitudes(model, group))
