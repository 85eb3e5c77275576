# SPDX-License-Identifier: Apache-2.0
"""What counts as a block, over families of networks that are built in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from modewright.calibration.blocks import find_blocks

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TEXT = {**SMALL, "vocab_size": 20}


def paths(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}.{i}" for i in range(count))


class ConvBlock(nn.Module):
    """A residual block; its shape depends on the stage."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(x).relu())  # type: ignore[no-any-return]


class Attributes(nn.Module):
    """Blocks that are attributes, not members of a container."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        for index, part in enumerate(parts):
            self.add_module(f"part{index}", part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.children():
            x = part(x)
        return x


class Experts(nn.Module):
    """A layer whose experts are repeated too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.experts = nn.ModuleList(two_linears() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((expert(x) for expert in self.experts), start=self.norm(x))


def two_linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def conv_bn(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        pytest.param("LlamaForCausalLM", TEXT, paths("model.layers", 3), id="llama"),
        pytest.param(
            "MixtralForCausalLM",
            {**TEXT, "num_key_value_heads": 1, "num_local_experts": 3},
            paths("model.layers", 3),
            id="mixtral",
        ),
        pytest.param(
            "LlamaForCausalLM",
            {**TEXT, "num_hidden_layers": 1},
            paths("model.layers", 1),
            id="llama of one layer",
        ),
        pytest.param(
            "GPT2LMHeadModel",
            {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20},
            paths("transformer.h", 2),
            id="gpt2",
        ),
        pytest.param("BertModel", TEXT, paths("encoder.layer", 3), id="bert"),
        pytest.param(
            "T5ForConditionalGeneration",
            {
                "d_model": 8,
                "d_kv": 4,
                "d_ff": 16,
                "num_layers": 2,
                "num_decoder_layers": 3,
                "num_heads": 2,
                "vocab_size": 20,
            },
            (*paths("encoder.block", 2), *paths("decoder.block", 3)),
            id="t5",
        ),
        pytest.param(
            "AlbertModel",
            {**TEXT, "embedding_size": 4},
            ("encoder.albert_layer_groups.0",),
            id="albert, one block that runs three times",
        ),
        pytest.param(
            "ResNetModel",
            {
                "embedding_size": 4,
                "hidden_sizes": [4, 8],
                "depths": [2, 2],
                "layer_type": "basic",
            },
            paths("encoder.stages", 2),
            id="resnet of transformers, stages",
        ),
    ],
)
def test_transformers(family: str, config: dict[str, Any], expected: tuple[str, ...]) -> None:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, family)
    assert find_blocks(cls(cls.config_class(**config))) == expected


def test_vit() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4))
    blocks = find_blocks(model)
    assert len(blocks) == 3
    assert {type(model.get_submodule(name)).__name__ for name in blocks} == {"ViTLayer"}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        pytest.param(
            lambda: nn.Transformer(8, 2, 2, 3, 16, batch_first=True),
            (*paths("encoder.layers", 2), *paths("decoder.layers", 3)),
            id="torch transformer",
        ),
        pytest.param(
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False
            ),
            ("layers.0",),
            id="encoder of one layer",
        ),
        pytest.param(
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3),
                nn.Sequential(ConvBlock(4, 4), ConvBlock(4, 4)),
                nn.Sequential(ConvBlock(4, 8), ConvBlock(8, 8)),
                nn.Sequential(ConvBlock(8, 8)),
                nn.Linear(8, 2),
            ),
            ("1.0", "1.1", "2.0", "2.1", "3.0"),
            id="stages of residual blocks of different shapes",
        ),
        pytest.param(
            lambda: Attributes(nn.Conv2d(3, 4, 3), ConvBlock(4, 4), ConvBlock(4, 8)),
            ("part1", "part2"),
            id="attributes",
        ),
        pytest.param(
            lambda: Attributes(
                Attributes(nn.Sequential(ConvBlock(4, 4), ConvBlock(4, 4))),
                Attributes(nn.Sequential(ConvBlock(4, 4), ConvBlock(4, 4))),
            ),
            ("part0.part0.0", "part0.part0.1", "part1.part0.0", "part1.part0.1"),
            id="two halves of one class",
        ),
        pytest.param(
            lambda: nn.Sequential(conv_bn(4), conv_bn(4), nn.Flatten(), nn.Linear(4, 2)),
            ("0", "1"),
            id="plain sequences of layers",
        ),
        pytest.param(
            lambda: nn.ModuleDict({"a": ConvBlock(4, 4), "b": ConvBlock(4, 4)}),
            ("a", "b"),
            id="dict of blocks",
        ),
        pytest.param(
            lambda: nn.Sequential(Experts(), Experts()), ("0", "1"), id="layers with experts"
        ),
        pytest.param(two_linears, (), id="layers only"),
        pytest.param(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(9))), (), id="mlp"),
        pytest.param(
            lambda: Attributes(two_linears(), two_linears()), (), id="features and classifier"
        ),
        pytest.param(lambda: nn.Linear(4, 4), (), id="one layer"),
        pytest.param(lambda: nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)]), (), id="lstm"),
    ],
)
def test_torch_modules(build: Callable[[], nn.Module], expected: tuple[str, ...]) -> None:
    assert find_blocks(build()) == expected


def test_a_block_under_two_names_is_found_once() -> None:
    block = ConvBlock(4, 4)
    first, second = nn.Sequential(block, ConvBlock(4, 4)), nn.Sequential(block, ConvBlock(4, 4))
    assert find_blocks(nn.Sequential(first, second)) == ("0.0", "0.1", "1.1")


def test_a_replaced_class_that_runs_the_same_code_is_the_same_kind() -> None:
    model = nn.Sequential(ConvBlock(4, 4), ConvBlock(4, 4))
    model[1].__class__ = type("Replaced", (ConvBlock,), {})
    assert find_blocks(model) == ("0", "1")
