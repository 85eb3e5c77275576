# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every family.

A perceptron, a network of all convolutions, a language model with a tied head, recurrent layers,
a transformer with torch's own attention, and a mixture of experts that are fused.
"""

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


class GatedBlock(nn.Module):
    """A norm without a mean, and a gated feed-forward layer, as language models have them."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features)
        self.gate = nn.Linear(features, hidden)
        self.up = nn.Linear(features, hidden, bias=False)
        self.down = nn.Linear(hidden, features)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = self.norm(x)
        return x + self.down(F.silu(self.gate(read)) * self.up(read))


class StreamLm(nn.Module):
    """A language model that reads its residual stream through norms; embedding and head tied."""

    def __init__(self, vocabulary: int = 20, features: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, features)
        self.blocks = nn.ModuleList([GatedBlock(features, 12) for _ in range(2)])
        self.norm = nn.RMSNorm(features)
        self.head = nn.Linear(features, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers, a GRU, a plain recurrent layer, a cell, and a head."""

    def __init__(self, features: int = 6, hidden: int = 5) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(2 * hidden, hidden, batch_first=True)
        self.rnn = nn.RNN(hidden, hidden, batch_first=True, bias=False)
        self.cell = nn.GRUCell(hidden, hidden)
        self.head = nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
        return self.head(self.cell(x[:, -1], x[:, 0]))


class Attending(nn.Module):
    """An encoder with a fused kernel for inference, and attention to inputs of another width."""

    def __init__(self, features: int = 8, width: int = 6) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(features, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.cross = nn.MultiheadAttention(features, 2, kdim=width, vdim=width, batch_first=True)
        self.head = nn.Linear(features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = x[..., : self.cross.kdim]
        return self.head(self.cross(self.encoder(x), memory, memory, need_weights=False)[0])


class FusedExperts(nn.Module):
    """Experts in 3-D parameters, ``[experts, out, in]`` or, transposed, ``[experts, in, out]``."""

    def __init__(self, experts: int, features: int, hidden: int, transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.hidden_size = experts, features
        sizes = [(2 * hidden, features), (features, hidden)]
        up, down = [size[::-1] if transposed else size for size in sizes]
        self.gate_up_proj = nn.Parameter(torch.randn(experts, *up) / 2)
        self.down_proj = nn.Parameter(torch.randn(experts, *down) / 2)
        self.is_transposed = transposed

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, place = torch.where(index == expert)
            up, down = self.gate_up_proj[expert], self.down_proj[expert]
            if not self.is_transposed:
                up, down = up.t(), down.t()
            gate, value = (x[token] @ up).chunk(2, dim=-1)
            out = (F.silu(gate) * value) @ down
            result = result.index_add(0, token, out * weights[token, place].unsqueeze(-1))
        return result


class MixtureBlock(nn.Module):
    """A router, and the experts that it picks two of for every token."""

    def __init__(self, features: int, transposed: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(features, 4, bias=False)
        self.experts = FusedExperts(4, features, 10, transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = self.gate(x).softmax(-1).topk(2, dim=-1)
        return x + self.experts(x, index, weights)


class Mixture(nn.Module):
    """Two blocks of experts, one of each layout, and a head."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.blocks = nn.Sequential(MixtureBlock(features, False), MixtureBlock(features, True))
        self.head = nn.Linear(features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


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
STREAM = Family("stream_lm", StreamLm, torch.arange(12).reshape(2, 6))
RNN = Family("recurrent", Recurrent, _floats(2, 4, 6))
MHA = Family("attention", Attending, _floats(2, 4, 8))
MOE = Family("experts", Mixture, _floats(6, 8))
FAMILIES = (MLP, CNN, LM, RNN, MHA, MOE)
