# SPDX-License-Identifier: Apache-2.0
"""A small language model that puts out logits as those of Transformers do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from support.models import StreamLm


class Logits:
    """What language models of Transformers return."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class SmallLm(StreamLm):
    """Predicts sharply enough that its predictions have something to lose."""

    def __init__(self) -> None:
        super().__init__(vocabulary=24, features=16)
        nn.init.normal_(self.embed.weight)

    def forward(self, ids: torch.Tensor) -> Any:
        return Logits(super().forward(ids))


def small_lm() -> SmallLm:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return SmallLm().eval()
