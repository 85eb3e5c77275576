# SPDX-License-Identifier: Apache-2.0
"""Tiny models: a perceptron, a network of all convolutions, a language model with a tied head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two linear layers with a residual connection."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(F.relu(self.fc1(x)))


class Mlp(nn.Module):
    """Two blocks, a norm and a head."""

    def __init__(self, features: int = 8, hidden: int = 12, classes: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(features, hidden), Block(features, hidden)])
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Convolutions(nn.Module):
    """One convolution of every kind, and batch norm for buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 3, 3, padding=1)
        self.up = nn.ConvTranspose1d(3, 4, 2, stride=2)
        self.two = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.up_two = nn.ConvTranspose2d(4, 2, 2)
        self.three = nn.Conv3d(2, 3, 2, bias=False)
        self.up_three = nn.ConvTranspose3d(3, 2, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.one(x))
        x = self.up_two(self.norm(self.two(x.unflatten(2, (4, 4)))))
        x = self.up_three(self.three(x.unsqueeze(2).repeat(1, 1, 3, 1, 1)))
        return self.head(x.mean(dim=(2, 3, 4)))


class TinyLm(nn.Module):
    """An embedding, a block, and a head that shares the embedding's weight."""

    def __init__(self, vocabulary: int = 20, features: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, features)
        self.block = Block(features, 2 * features)
        self.head = nn.Linear(features, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(ids)))


@dataclass(frozen=True)
class Family:
    """A tiny model that is the same one at every call, and an input for it."""

    name: str
    cls: Callable[[], nn.Module]
    inputs: torch.Tensor

    def make(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.cls().eval()

    def run(self, model: nn.Module) -> Any:
        with torch.no_grad():
            return model(self.inputs)

    @property
    def batches(self) -> list[torch.Tensor]:
        return [self.inputs, self.inputs[:1]]


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


MLP = Family("mlp", Mlp, _floats(3, 8))
CNN = Family("cnn", Convolutions, _floats(2, 2, 8))
LM = Family("tied_lm", TinyLm, torch.arange(12).reshape(2, 6))
FAMILIES = (MLP, CNN, LM)
