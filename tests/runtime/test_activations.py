# SPDX-License-Identifier: Apache-2.0
"""Quantized inputs of packed layers: what the fake quantizer does, from a record."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modewright.errors import ConfigError
from modewright.quantization.packing import activation_spec
from modewright.quantization.quantizer import Quantizer
from modewright.quantization.representation import QuantizerConfig
from modewright.runtime.activations import ActivationSpec

CONFIGS: list[dict[str, Any]] = [
    {"granularity": "token", "dynamic": True},
    {"granularity": "tensor", "dynamic": True},
    {"granularity": "group", "group_size": 5, "dynamic": True},
    {"granularity": "token", "dynamic": True, "symmetric": False, "num_bits": 5},
    {"format": "fp8_e4m3", "granularity": "token", "dynamic": True},
    {
        "format": "fp4_e2m1",
        "granularity": "group",
        "group_size": 16,
        "scale_format": "e4m3",
        "dynamic": True,
    },
    {
        "format": "fp6_e2m3",
        "granularity": "group",
        "group_size": 32,
        "scale_format": "e8m0",
        "dynamic": True,
    },
    {"granularity": "tensor"},
    {"granularity": "tensor", "symmetric": False},
]
X = torch.randn(3, 4, 22, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_bits_of_the_fake_quantizer(
    config: dict[str, Any], dtype: torch.dtype
) -> None:
    quantizer = Quantizer(QuantizerConfig(**config), None)
    if not quantizer.config.dynamic:
        quantizer.set_from_range(X.min() / 2, X.max() / 2)
    spec = ActivationSpec.from_dict(activation_spec(quantizer).as_dict())
    x = X.to(dtype)

    assert torch.equal(spec.simulate(x, quantizer.scale, quantizer.zero_point), quantizer(x))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (ActivationSpec("int8", "token"), "int8_token"),
        (ActivationSpec("int8", "tensor", calibrated=True), "int8_tensor"),
        (ActivationSpec("int8", "tensor"), None),
        (ActivationSpec("uint8", "token"), None),
        (ActivationSpec("int8", "group", 32, "e8m0"), None),
        (ActivationSpec("fp8_e4m3", "token"), "fp8_token"),
        (ActivationSpec("fp8_e4m3", "tensor", calibrated=True), "fp8_tensor"),
        (ActivationSpec("fp8_e5m2", "token"), None),
    ],
)
def test_kernels_know_some_cases_by_name(spec: ActivationSpec, name: str | None) -> None:
    assert spec.name == name


@pytest.mark.parametrize(
    "recorded",
    [
        None,
        {},
        {"format": "int9"},
        {"format": 8},
        {"format": "int8", "other": 1},
        {"format": "int8", "granularity": "channel"},
        {"format": "int8", "granularity": "group"},
        {"format": "int8", "granularity": "group", "group_size": 0},
        {"format": "int8", "granularity": "token", "calibrated": True},
        {"format": "int8", "calibrated": 1},
        {"format": "int8", "scale_format": "fp16"},
    ],
    ids=str,
)
def test_what_is_no_description_is_refused(recorded: object) -> None:
    with pytest.raises(ConfigError):
        ActivationSpec.from_dict(recorded)
