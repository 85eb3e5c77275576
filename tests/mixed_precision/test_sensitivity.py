# SPDX-License-Identifier: Apache-2.0
"""Scores against exact curvature, against a slow reference, and against each other."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modewright
from modewright.mixed_precision.divergence import divergence_scores
from modewright.mixed_precision.gradient import gradient_scores, random_vector
from modewright.mixed_precision.observing import group_layers, observe
from modewright.mixed_precision.trials import Trial, standing_in, twin
from modewright.quantization.layers import fitted_scheme
from modewright.quantization.schemes import scheme
from support.models import CNN, FAMILIES, MHA, MLP, MOE, RNN, Family
from support.small_lm import Logits, SmallLm, small_lm

NAMES = ("w3a16", "w4a16", "w8a16")


def trials_for(model: nn.Module, paths: list[str], names: Any = NAMES) -> Any:
    made = {}
    for path in paths:
        layer = model.get_submodule(path)
        made[path] = {n: Trial(layer, fitted_scheme(layer, scheme(n))) for n in names}
    return made


# --- the curvature -------------------------------------------------------------------------------


def test_random_vectors_have_the_covariance_of_the_fisher_information() -> None:
    logits = torch.tensor([1.0, -0.5, 2.0, 0.0])
    p = logits.softmax(-1)
    vectors = random_vector(logits.expand(40_000, 4), True, torch.Generator().manual_seed(0))
    covariance = vectors.t() @ vectors / len(vectors)

    assert torch.allclose(covariance, torch.diag(p) - torch.outer(p, p), atol=0.01)
    assert vectors.sum(-1).abs().max() < 1e-5  # shifting all logits changes nothing


def test_for_other_outputs_vectors_give_the_relative_squared_error() -> None:
    output = torch.randn(3000, 8, generator=torch.Generator().manual_seed(1))
    vectors = random_vector(output, False, torch.Generator().manual_seed(0))
    change = torch.linspace(-1, 1, 8)
    found = 0.5 * (vectors @ change).square().mean()

    assert found == pytest.approx(float(change.square().mean() / output.var()), rel=0.05)


class Softmax(nn.Module):
    """One layer that puts out logits: the curvature is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> Any:
        return Logits(self.layer(x))


def test_score_of_an_output_layer_is_the_exact_second_order_divergence() -> None:
    torch.manual_seed(0)
    model = Softmax()
    x = torch.randn(50, 12)
    trials = trials_for(model, ["layer"])
    scores = gradient_scores(model, [["layer"]], trials, [x], probes=600)
    for name, trial in trials["layer"].items():
        weight = trial.layer.quantized_weight().detach() - model.layer.weight.detach()
        change = x @ weight.t()
        p = model(x).logits.detach().softmax(-1)
        exact = ((p * change.square()).sum(-1) - (p * change).sum(-1).square()).mean() / 2
        assert scores[0][name] == pytest.approx(float(exact), rel=0.1)


def test_second_order_scores_are_close_to_measured_divergences(
    model: SmallLm, batches: list[torch.Tensor]
) -> None:
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    groups = group_layers(model, paths, observe(model, paths, batches).shared)
    trials = trials_for(model, paths, ["w4a16", "w5a16"])
    estimated = gradient_scores(model, groups, trials, batches, probes=4)
    measured = divergence_scores(model, groups, trials, batches)

    for row, exact in zip(estimated, measured, strict=True):
        for name in row:
            assert row[name] == pytest.approx(exact[name], rel=0.35)


def test_layers_of_a_group_are_scored_together(model: SmallLm, batches: list[torch.Tensor]) -> None:
    paths = ["blocks.0.gate", "blocks.0.up"]
    trials = trials_for(model, paths, ["w3a16"])
    together = gradient_scores(model, [paths], trials, batches)[0]["w3a16"]
    alone = [gradient_scores(model, [[p]], trials, batches)[0]["w3a16"] for p in paths]
    measured = divergence_scores(model, [paths], trials, batches)[0]["w3a16"]

    assert together != pytest.approx(sum(alone), rel=1e-3)
    assert together == pytest.approx(measured, rel=0.35)


# --- the replay ----------------------------------------------------------------------------------


def test_replayed_divergence_is_that_of_the_whole_quantized_model(
    model: SmallLm, batches: list[torch.Tensor]
) -> None:
    groups = [["blocks.1.down"], ["blocks.0.gate", "blocks.0.up"], ["head"]]
    paths = [path for group in groups for path in group]
    found = divergence_scores(model, groups, trials_for(model, paths, ["w3a16"]), batches)
    for group, row in zip(groups, found, strict=True):
        low = small_lm()
        low.head.weight = nn.Parameter(low.head.weight.detach().clone())
        config = {"scheme": "none", "rules": [{"targets": group, "scheme": "w3a16"}]}
        modewright.apply_mode(low, [("quantize", config), "mse"])
        divergence = 0.0
        with torch.no_grad():
            for batch in batches:
                p, q = model(batch).logits.log_softmax(-1), low(batch).logits.log_softmax(-1)
                rows = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
                divergence += float(rows.mean()) / len(batches)
        assert row["w3a16"] == pytest.approx(divergence, rel=1e-4)


def test_scoring_leaves_the_model_as_it_was(model: SmallLm, batches: list[torch.Tensor]) -> None:
    paths = ["blocks.0.down", "blocks.1.down"]
    before = [p.requires_grad for p in model.parameters()]
    expected = model(batches[0]).logits
    trials = trials_for(model, paths)
    gradient_scores(model, [[p] for p in paths], trials, batches)
    divergence_scores(model, [[p] for p in paths], trials, batches)

    assert torch.equal(model(batches[0]).logits, expected)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


# --- trials --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("name", ["w4a16_asym", "w8a8"])
def test_trial_changes_a_layer_as_quantizing_it_would(family: Family, name: str) -> None:
    plain = family.make()
    quantized = modewright.apply_mode(family.make(), ("quantize", {"scheme": name}))
    calls: dict[str, Any] = {}
    for path in modewright.mode_state(quantized)["modes"][0]["metadata"]["layers"]:
        plain.get_submodule(path).register_forward_pre_hook(
            lambda m, args, kwargs, path=path: calls.setdefault(path, (args, kwargs)) and None,
            with_kwargs=True,
        )
    family.run(plain)
    assert calls
    for path, (args, kwargs) in calls.items():
        layer = plain.get_submodule(path)
        low = family.make()
        config = {"scheme": "none", "rules": [{"targets": [path], "scheme": name}]}
        modewright.apply_mode(low, [("quantize", config), "mse"])
        trial = Trial(layer, fitted_scheme(layer, scheme(name)))
        expected = first(low.get_submodule(path)(*args, **kwargs)) - first(layer(*args, **kwargs))
        assert torch.allclose(trial.change(args, kwargs), expected, atol=1e-5)
        assert trial.weight_error() > 0


def first(output: Any) -> torch.Tensor:
    return (output[0] if isinstance(output, tuple) else output).detach()


def test_twin_shares_parameters_and_nothing_that_changes() -> None:
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda *a: pytest.fail("hook ran"))
    other = twin(layer)
    other(torch.zeros(1, 3))
    assert other.weight is layer.weight
    other.bias = None
    other.register_buffer("more", torch.zeros(1))

    assert layer.bias is not None
    assert list(layer._buffers) == []


def test_layers_stand_in_for_others_only_inside_the_context() -> None:
    model = MLP.make()
    before = MLP.run(model)
    trials = trials_for(model, ["head"])
    with standing_in({model.head: trials["head"]["w3a16"]}):
        inside = MLP.run(model)

    assert not torch.equal(inside, before)
    assert torch.equal(MLP.run(model), before)


# --- groups --------------------------------------------------------------------------------------


def test_layers_with_one_input_and_tied_weights_are_groups(
    model: SmallLm, batches: list[torch.Tensor]
) -> None:
    paths = ["embed", "blocks.0.gate", "blocks.0.up", "blocks.0.down", "blocks.1.gate", "head"]
    observed = observe(model, paths, batches)

    assert observed.reached == set(paths)
    assert group_layers(model, paths, observed.shared) == [
        ["embed", "head"],
        ["blocks.0.gate", "blocks.0.up"],
        ["blocks.0.down"],
        ["blocks.1.gate"],
    ]


def test_one_input_given_by_different_modules_makes_no_group() -> None:
    class Fan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({n: nn.Sequential(nn.Linear(4, 4)) for n in "ab"})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts["a"](x) + self.parts["b"](x)

    assert observe(Fan(), ["parts.a.0", "parts.b.0"], [torch.ones(2, 4)]).shared == []


def test_importance_is_the_mean_square_of_inputs_relative_to_their_mean() -> None:
    model = nn.Sequential(OrderedDict(layer=nn.Linear(3, 2)))
    x = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0]])  # of equal lengths: all count alike
    found = observe(model, ["layer"], [x, x]).importance["layer"]

    assert torch.allclose(found, torch.tensor([1.5, 1.5, 0.0]))


@pytest.mark.parametrize("family", [CNN, RNN, MHA, MOE], ids=lambda family: family.name)
def test_every_family_is_scored_both_ways(family: Family) -> None:
    model = family.make()
    low = modewright.apply_mode(family.make(), ("quantize", {"scheme": "w4a16"}))
    layers = list(modewright.mode_state(low)["modes"][0]["metadata"]["layers"])
    observed = observe(model, layers, family.batches)
    groups = [[path] for path in layers if path in observed.reached]
    trials = trials_for(model, [path for (path,) in groups], ["w2a16", "w8a16"])
    for scores in (
        gradient_scores(model, groups, trials, family.batches, probes=8),
        divergence_scores(model, groups, trials, family.batches),
    ):
        assert sum(row["w8a16"] for row in scores) < sum(row["w2a16"] for row in scores) / 20
        assert all(row["w2a16"] > 0 for row in scores)
