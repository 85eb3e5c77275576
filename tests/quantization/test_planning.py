# SPDX-License-Identifier: Apache-2.0
"""Which layer gets which scheme, and what is said about those that get none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import ConfigError, MatchError
from modewright.quantization.config import QuantizeConfig
from modewright.quantization.planning import LayerPlan, SkipReason, plan_layers


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return super().forward(input) + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.up = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.down = nn.Linear(8, 4)
        self.head = nn.Linear(4, 8, bias=False)


def planned(model: nn.Module | None = None, **fields: Any) -> LayerPlan:
    return plan_layers(model or Model(), QuantizeConfig(**fields))


def bits(plan: LayerPlan) -> dict[str, int | None]:
    return {n: s.weights.num_bits if s.weights else None for n, s in plan.schemes.items()}


def test_linear_and_convolution_layers_are_the_default() -> None:
    assert bits(planned()) == {"up": 8, "conv": 8, "down": 8, "head": 8}


def test_ignore_leaves_layers_alone() -> None:
    assert bits(planned(ignore=["head", "Conv1d"])) == {"up": 8, "down": 8}


def test_targets_may_name_an_embedding() -> None:
    assert bits(planned(targets=["Embedding", "down"])) == {"embedding": 8, "down": 8}


def test_later_rules_win_and_change_only_what_they_say() -> None:
    plan = planned(
        scheme="w8a8",
        rules=[
            {"targets": ["Linear"], "weights": {"num_bits": 4}},
            {"targets": ["down"], "weights": {"group_size": 2, "symmetric": False}},
            {"targets": ["Linear"], "ignore": ["up"], "input_activations": {"enable": False}},
        ],
    )

    assert bits(plan) == {"up": 4, "conv": 8, "down": 4, "head": 4}
    down = plan.schemes["down"].weights
    assert down is not None
    assert (down.granularity, down.group_size, down.symmetric) == ("group", 2, False)
    assert plan.schemes["up"].input_activations is not None
    assert plan.schemes["down"].input_activations is None


def test_a_rule_may_take_another_scheme_or_none() -> None:
    plan = planned(
        scheme="w8a16",
        rules=[
            {"targets": ["up"], "scheme": "none"},
            {"targets": ["embedding"], "scheme": "w4a16"},
        ],
    )

    assert bits(plan) == {"embedding": 4, "conv": 8, "down": 8, "head": 8}


def test_rules_alone_may_pick() -> None:
    plan = planned(scheme="none", rules=[{"targets": ["up"], "scheme": "w4a16"}])

    assert bits(plan) == {"up": 4}


def test_a_rule_may_switch_on_what_the_scheme_leaves_off() -> None:
    plan = planned(
        scheme="w8a16", rules=[{"targets": ["up"], "output_activations": {"num_bits": 6}}]
    )

    output = plan.schemes["up"].output_activations
    assert output is not None
    assert (output.num_bits, output.granularity, output.dynamic) == (6, "tensor", False)


@pytest.mark.parametrize(
    ("fields", "where", "nearest"),
    [
        ({"targets": ["Linaer"]}, "`targets`", "Linear"),
        ({"ignore": ["haed"]}, "`ignore`", "head"),
        ({"rules": [{"targets": ["dwon"], "scheme": "none"}]}, "`rules[0].targets`", "down"),
        (
            {"rules": [{"targets": ["down"], "ignore": ["upp"], "scheme": "none"}]},
            "`rules[0].ignore`",
            "up",
        ),
    ],
    ids=["targets", "ignore", "rule targets", "rule ignore"],
)
def test_a_pattern_that_matches_nothing_is_an_error(
    fields: dict[str, Any], where: str, nearest: str
) -> None:
    with pytest.raises(MatchError) as caught:
        planned(**fields)

    assert where in str(caught.value)
    assert nearest in str(caught.value)


def test_a_pattern_that_matches_only_what_cannot_be_quantized_is_an_error() -> None:
    with pytest.raises(MatchError, match="matches only LayerNorm, which cannot be quantized"):
        planned(targets=["norm"])


def test_a_model_with_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(MatchError, match="would quantize nothing"):
        planned(nn.Sequential(nn.ReLU()))


def test_unmatched_patterns_may_be_reported_instead() -> None:
    plan = planned(ignore=["lm_head"], on_unmatched="report")

    assert plan.unmatched == ("lm_head",)
    assert "pattern 'lm_head' matches nothing to quantize" in plan.lines()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scheme": "w8a9"}, "There is no scheme 'w8a9'. Did you mean 'w8a8'"),
        ({"rules": [{"targets": ["up"], "scheme": "w5"}]}, "There is no scheme 'w5'"),
        ({"ingore": ["head"]}, "Did you mean 'ignore'"),
        ({"rules": [{"targets": []}]}, "rules.0.targets"),
        ({"rules": [{"targets": ["up"], "weights": {"num_bits": 9}}]}, "less than or equal to 8"),
    ],
    ids=["scheme", "scheme of a rule", "typo", "no targets", "bits"],
)
def test_a_config_that_does_not_validate_is_an_error(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        modewright.apply_mode(Model(), ("quantize", fields))

    assert words in str(caught.value)


def test_a_rule_that_contradicts_its_scheme_is_an_error() -> None:
    rule = {"targets": ["up"], "input_activations": {"dynamic": False}}

    with pytest.raises(ConfigError, match="needs dynamic=True") as caught:
        planned(scheme="w8a8", rules=[rule])

    assert "rules[0]" in str(caught.value)


def skips(model: nn.Module, **fields: Any) -> dict[str, SkipReason]:
    return planned(model, **fields).skipped


def test_a_layer_with_a_forward_of_its_own_is_skipped() -> None:
    patched = nn.Linear(2, 2)
    patched.forward = lambda data: data  # type: ignore[method-assign]
    model = nn.Sequential(Own(2, 2), patched, nn.Linear(2, 2))

    assert skips(model) == {"0": SkipReason.OWN_FORWARD, "1": SkipReason.OWN_FORWARD}


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        (nn.MultiheadAttention(4, 2), {"0.out_proj"}),
        (nn.TransformerEncoderLayer(4, 2, 8), {"0.self_attn.out_proj", "0.linear1", "0.linear2"}),
    ],
    ids=["attention", "encoder layer"],
)
def test_a_layer_that_its_parent_reads_without_calling_is_skipped(
    parent: nn.Module, expected: set[str]
) -> None:
    skipped = skips(nn.Sequential(parent, nn.Linear(4, 4)))

    assert set(skipped) == expected
    assert set(skipped.values()) == {SkipReason.READ_BY_PARENT}


def test_a_weight_of_integers_is_skipped() -> None:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int32), requires_grad=False)

    assert skips(nn.Sequential(layer, nn.Linear(2, 2))) == {"0": SkipReason.NOT_FLOATING}


def test_layers_that_share_a_weight_are_quantized_together_or_not_at_all() -> None:
    model = Model()
    model.head.weight = model.embedding.weight

    assert skips(model) == {"head": SkipReason.SHARED_WEIGHT}
    assert skips(model, targets=["Linear", "Embedding"]) == {}
    different = [{"targets": ["head"], "weights": {"num_bits": 4}}]
    assert set(skips(model, targets=["Linear", "Embedding"], rules=different)) == {
        "head",
        "embedding",
    }


def test_the_plan_is_told_in_words() -> None:
    model = Model()
    model.head.weight = model.embedding.weight
    lines = planned(model, scheme="w4a16").lines()

    assert lines == [
        "3 layers: int4 weights in groups of 64 (up, conv, down)",
        f"skips head: {SkipReason.SHARED_WEIGHT.value}",
    ]
