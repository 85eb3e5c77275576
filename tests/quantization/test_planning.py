# SPDX-License-Identifier: Apache-2.0
"""Rules: which layer gets which scheme, what is skipped and why, which patterns are refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal

import modewright
from modewright.errors import MatchError
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.planning import SkipReason


class OwnForward(nn.Linear):
    """Bypasses whatever the base class does with its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.t()


class Tied(nn.Module):
    """A head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.embed(ids)))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.Linear(4, 2),
    )


def quantize(model: nn.Module, **config: Any) -> dict[str, Any]:
    """Apply mode ``quantize``; return its metadata."""
    modewright.apply_mode(model, [("quantize", config)])
    metadata: dict[str, Any] = modewright.mode_state(model)["modes"][0]["metadata"]
    return metadata


def weight_bits(metadata: dict[str, Any]) -> dict[str, int | None]:
    return {
        name: layer["weights"] and layer["weights"]["num_bits"]
        for name, layer in metadata["layers"].items()
    }


def skipped(metadata: dict[str, Any]) -> dict[str, str]:
    return {entry["module"]: entry["reason"] for entry in metadata["skipped"]}


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({}, {"0.0": 8, "0.2": 8, "1.0": 8, "2": 8}, id="all linear layers"),
        pytest.param({"targets": ["0.*"]}, {"0.0": 8, "0.2": 8}, id="targets"),
        pytest.param({"ignore": ["2", "0.*"]}, {"1.0": 8}, id="ignore"),
        pytest.param({"targets": ["Linear"], "ignore": ["[01].*"]}, {"2": 8}, id="both"),
        pytest.param(
            {"rules": [{"targets": ["0.*"], "scheme": "w4a16"}]},
            {"0.0": 4, "0.2": 4, "1.0": 8, "2": 8},
            id="rule",
        ),
        pytest.param(
            {
                "rules": [
                    {"targets": ["*"], "scheme": "w4a16"},
                    {"targets": ["2"], "weights": {"num_bits": 6}},
                ]
            },
            {"0.0": 4, "0.2": 4, "1.0": 4, "2": 6},
            id="later rules win",
        ),
        pytest.param(
            {"rules": [{"targets": ["*"], "ignore": ["0.*"], "weights": {"num_bits": 3}}]},
            {"0.0": 8, "0.2": 8, "1.0": 3, "2": 3},
            id="exceptions of a rule",
        ),
        pytest.param(
            {"rules": [{"targets": ["2"], "scheme": "none"}]},
            {"0.0": 8, "0.2": 8, "1.0": 8},
            id="scheme none",
        ),
        pytest.param(
            {"scheme": "none", "rules": [{"targets": ["2"], "scheme": "w4a16"}]},
            {"2": 4},
            id="nothing but what rules pick",
        ),
        pytest.param(
            {"targets": [], "rules": [{"targets": ["2"], "weights": {"num_bits": 5}}]},
            {"2": 5},
            id="no targets but those of rules",
        ),
        pytest.param(
            {"targets": ["2"], "rules": [{"targets": ["1.0"], "scheme": "w4a16"}]},
            {"1.0": 4, "2": 8},
            id="a rule reaches beyond targets",
        ),
        pytest.param(
            {"ignore": ["2"], "rules": [{"targets": ["2", "1.0"], "scheme": "w4a16"}]},
            {"0.0": 8, "0.2": 8, "1.0": 4},
            id="ignore wins over rules",
        ),
    ],
)
def test_which_layers_get_which_scheme(config: dict[str, Any], expected: dict[str, int]) -> None:
    model = network()
    metadata = quantize(model, **{"scheme": "w8a16", **config})
    assert weight_bits(metadata) == expected
    assert quantized(model) == set(expected)
    for name, bits in expected.items():
        assert model.get_submodule(name).weight_quantizer.config.num_bits == bits


def test_each_quantizer_of_a_layer_can_be_set_alone() -> None:
    model = network()
    rule = {
        "targets": ["2"],
        "weights": {"enable": False},
        "input_activations": {"granularity": "tensor", "num_bits": 4, "symmetric": False},
        "output_activations": {"enable": True},
    }
    quantize(model, scheme="w8a8", rules=[rule])
    layer = model[2]
    assert layer.weight_quantizer is None
    assert str(layer.input_quantizer) == "Quantizer(uint4 tensor dynamic)"
    assert str(layer.output_quantizer) == "Quantizer(int8 tensor)"
    assert str(model[1][0].weight_quantizer) == "Quantizer(int8 channel)"


def test_layers_with_a_forward_of_their_own_are_quantized() -> None:
    model = nn.Sequential(OwnForward(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].forward = types.MethodType(lambda self, x: x, model[1])
    assert skipped(quantize(model)) == {}
    assert quantized(model) == {"0", "1", "2"}


def test_layers_whose_parent_reads_their_weight_are_quantized() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "encoder": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            "decoder": nn.TransformerDecoderLayer(4, 2, 8),
        }
    )
    assert skipped(quantize(model)) == {}
    by_attention = {
        f"{name}{part}"
        for name in ("attention", "encoder.self_attn", "decoder.self_attn",
                     "decoder.multihead_attn")
        for part in ("", ".out_proj")
    }  # fmt: skip
    linear = {f"{side}.linear{number}" for side in ("encoder", "decoder") for number in (1, 2)}
    assert quantized(model) == by_attention | linear


class Routed(nn.Module):
    """A linear router beside its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


@pytest.mark.parametrize(
    ("config", "routed"),
    [
        ({}, False),
        ({"targets": ["Linear"]}, False),
        ({"targets": ["*"]}, False),
        ({"targets": ["Linear", "*.gate"]}, True),
        ({"targets": ["re:.*experts.*|.*gate"]}, True),
        ({"rules": [{"targets": ["moe.gate"], "scheme": "w8a16"}]}, True),
    ],
)
def test_a_router_is_skipped_unless_a_pattern_names_it(
    config: dict[str, Any], routed: bool
) -> None:
    model = nn.ModuleDict({"moe": Routed(), "gate": nn.Linear(4, 4)})
    metadata = quantize(model, **config)
    assert ("moe.gate" in quantized(model)) == routed
    assert skipped(metadata) == ({} if routed else {"moe.gate": SkipReason.ROUTER})
    assert {"moe.experts.0", "moe.experts.1"} <= quantized(model)


def test_a_gate_that_is_no_router_is_quantized() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(4, 4), "up": nn.Linear(4, 4)})
    assert skipped(quantize(model)) == {}


def test_recurrent_and_attention_weights_that_are_shared_are_skipped() -> None:
    model = nn.Sequential(nn.LSTM(4, 4), nn.LSTM(4, 4), nn.Linear(4, 4))
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    assert skipped(quantize(model, targets=["1", "2"])) == {"1": SkipReason.SHARED_WEIGHT}
    other = nn.Sequential(nn.LSTM(4, 4), nn.LSTM(4, 4))
    other[1].weight_hh_l0 = other[0].weight_hh_l0
    assert skipped(quantize(other)) == {}
    assert quantized(other) == {"0", "1"}


def test_a_layer_with_integer_weights_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert skipped(quantize(model)) == {"0": SkipReason.NOT_FLOATING}


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_a_layer_whose_weight_is_no_parameter_is_skipped(scheme: str) -> None:
    model = nn.Sequential(orthogonal(nn.Linear(4, 4)), nn.LazyLinear(4), nn.Linear(4, 4))
    expected = dict.fromkeys(("0", "1"), SkipReason.NO_PARAMETER)
    assert skipped(quantize(model, scheme=scheme)) == expected


def test_a_pruned_layer_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    assert skipped(quantize(model)) == {"0": SkipReason.NO_PARAMETER}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="the embedding is no target"),
        pytest.param({"targets": ["embed", "fc"]}, id="the head is no target"),
        pytest.param(
            {
                "targets": ["Embedding", "Linear"],
                "rules": [{"targets": ["head"], "scheme": "w4a16"}],
            },
            id="another scheme",
        ),
    ],
)
def test_a_shared_weight_that_is_not_quantized_alike_is_skipped(config: dict[str, Any]) -> None:
    model = Tied()
    metadata = quantize(model, **config)
    assert quantized(model) == {"fc"}
    assert set(skipped(metadata).values()) == {SkipReason.SHARED_WEIGHT}


def test_a_weight_that_a_module_holds_by_another_name_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.table = model[0].weight
    assert skipped(quantize(model)) == {"0": SkipReason.SHARED_WEIGHT}
    assert quantized(model) == {"1"}


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16", "w8a8_static"])
def test_a_tied_embedding_and_head_are_quantized_together_and_stay_tied(scheme: str) -> None:
    model, ids = Tied(), torch.tensor([[0, 1, 5]])
    modewright.quantize(
        model, scheme, calibration=[ids], config={"targets": ["Embedding", "Linear"]}
    )
    assert quantized(model) == {"embed", "fc", "head"}
    assert model.embed.weight is model.head.weight
    table, weight = model.embed.quantized_weight(), model.head.quantized_weight()
    assert torch.equal(table, weight)
    modewright.apply_mode(model, "export_quantize")
    assert model.embed.weight is model.head.weight
    assert torch.equal(model.embed.weight, weight)


def test_a_shared_weight_stays_shared_where_only_inputs_are_quantized() -> None:
    model = Tied()
    rules = [{"targets": ["head"], "input_activations": {"enable": True, "dynamic": True}}]
    metadata = quantize(model, scheme="none", rules=rules)
    assert not metadata["skipped"]
    modewright.apply_mode(model, "export_quantize")
    assert model.embed.weight is model.head.weight


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param({"ignore": ["lm_head"]}, ["`ignore`", "'lm_head'"], id="ignore"),
        pytest.param({"targets": ["Liner"]}, ["`targets`", "'Linear'"], id="targets"),
        pytest.param(
            {"rules": [{"targets": ["*"]}, {"targets": ["0.O"]}]},
            ["`rules[1].targets`", "'0.0'"],
            id="targets of a rule",
        ),
        pytest.param(
            {"rules": [{"targets": ["*"], "ignore": ["0.7"]}]},
            ["`rules[0].ignore`", "'0.7'", "'0.0'"],
            id="exceptions of a rule",
        ),
        pytest.param(
            {"targets": ["LayerNorm", "ReLU"]}, ["only LayerNorm", "Linear"], id="not supported"
        ),
        pytest.param(
            {"targets": ["Linear", "0.1"]}, ["'0.1' matches only LayerNorm"], id="one of several"
        ),
        pytest.param({"targets": ["1"]}, ["only Sequential", "'.*'"], id="container"),
        pytest.param({"scheme": "none"}, ["quantize nothing"], id="no scheme"),
        pytest.param({"ignore": ["*"]}, ["quantize nothing"], id="all ignored"),
        pytest.param({"targets": []}, ["quantize nothing"], id="no targets"),
    ],
)
def test_a_pattern_without_effect_is_an_error_before_anything_changes(
    config: dict[str, Any], words: list[str]
) -> None:
    model = network()
    with pytest.raises(MatchError, match="quantize") as caught:
        modewright.apply_mode(model, [("quantize", config)])
    for word in words:
        assert word in str(caught.value)
    assert not quantized(model)
    assert not modewright.is_converted(model)


def test_patterns_without_effect_can_be_reported_instead() -> None:
    model = network()
    metadata = quantize(
        model,
        targets=["Linear", "Liner", "LayerNorm"],
        ignore=["lm_head"],
        rules=[{"targets": ["nowhere"], "ignore": ["neither"], "scheme": "none"}],
        on_unmatched="report",
    )
    assert metadata["unmatched"] == ["Liner", "LayerNorm", "nowhere", "neither", "lm_head"]
    assert quantized(model) == {"0.0", "0.2", "1.0", "2"}


def test_a_model_without_layers_to_quantize_is_an_error() -> None:
    with pytest.raises(MatchError, match="quantize nothing"):
        modewright.quantize(nn.Sequential(nn.ReLU()), "w8a8")


def test_a_plan_says_what_is_quantized_skipped_and_unmatched() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.LazyLinear(4), nn.Linear(4, 4))
    config = {
        "scheme": "w8a8",
        "rules": [{"targets": ["3"], "scheme": "w4a16"}],
        "ignore": ["head"],
        "on_unmatched": "report",
    }
    text = str(modewright.plan(model, [("quantize", config)]))
    for part in (
        "int8 weights per channel, int8 inputs per token (dynamic) (0)",
        "int8 weights per channel, int8 inputs per tensor (dynamic) (1)",
        "int4 weights in groups of 64 (3)",
        f"skips 2: {SkipReason.NO_PARAMETER.value}",
        "'head' matches nothing",
    ):
        assert part in text
    assert not quantized(model)
