# SPDX-License-Identifier: Apache-2.0
"""Small networks whose dimensions hang together in every way that pruning must know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two blocks with skip connections, one of them through a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.first = block(16, 16)
        self.second = block(16, 24, stride=2)
        self.skip = nn.Sequential(nn.Conv2d(16, 24, 1, stride=2), nn.BatchNorm2d(24))
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.first(x))
        x = F.relu(self.skip(x) + self.second(x))
        return self.head(x.mean((2, 3)))


def block(taken: int, made: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(taken, made, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(made),
        nn.ReLU(inplace=True),
        nn.Conv2d(made, made, 3, padding=1),
        nn.BatchNorm2d(made),
    )


class Dense(nn.Module):
    """Concatenations, then flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 12, 3, padding=1)
        self.c = nn.Conv2d(20, 16, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(36 * 4, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(self.a(x))
        both = torch.cat([a, F.relu(self.b(a))], dim=1)
        x = F.max_pool2d(torch.cat([both, self.c(both)], dim=1), 2)
        return self.head(F.relu(self.hidden(torch.flatten(self.pool(x), 1))))


class Mobile(nn.Module):
    """An inverted residual: pointwise, depthwise, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.wide = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.deep = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.SiLU()
        )
        self.squeeze = nn.Linear(32, 8)
        self.excite = nn.Linear(8, 32)
        self.narrow = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.deep(self.wide(x))
        batch, channels = y.shape[:2]
        scale = self.excite(F.relu(self.squeeze(y.mean((2, 3))))).sigmoid()
        x = x + self.narrow(y * scale.view(batch, channels, 1, 1))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Grouped(nn.Module):
    """A grouped convolution, a group norm and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(6, 24)
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.grouped(F.gelu(self.stem(x))))
        return self.head(F.relu(self.up(x)))


class Next(nn.Module):
    """Channels last, with a layer norm, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 48)
        self.down = nn.Linear(48, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean((-2, -1)))


class FusedAttention(nn.Module):
    """Attention written out, with queries, keys and values in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, -1, 8).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))
        return self.head(x[:, 0])


class Gated(nn.Module):
    """A gated linear unit whose halves come out of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 40)
        self.down = nn.Linear(20, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.head(F.relu(self.down(F.silu(gate) * value)))


class Experts(nn.Module):
    """A router and a list of experts, run in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)) for _ in range(4)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        mask = F.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            place, token = torch.where(mask[number])
            result.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return self.head(x + result)


class Recurrent(nn.Module):
    """A layer that no rule knows, between two that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.memory = nn.GRU(8, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(self.inner(x))[0])


def image(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def rows() -> torch.Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "residual": (Residual, image),
    "dense": (Dense, image),
    "mobile": (Mobile, image),
    "grouped": (Grouped, image),
    "next": (Next, image),
    "fused_attention": (FusedAttention, rows),
    "gated": (Gated, rows),
    "experts": (Experts, rows),
    "recurrent": (Recurrent, rows),
}


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a network in eval mode, with weights and statistics that are not trivial."""
    make, make_input = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, make_input()
