# SPDX-License-Identifier: Apache-2.0
"""A mode whose search bounds what models really cost, scores what it tries and can be resumed."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from modewright.modes.registry import ModeRegistry
from modewright.modes.searcher import BaseSearcher
from support.example_modes import ExportWidthsMode, WidthsMode, elastic_blocks

CHOICES = (4, 8, 12)


class ElasticSearcher(BaseSearcher):
    """Tries every combination of widths; the least distorted output is the best."""

    tried: int

    @property
    def default_search_config(self) -> dict[str, Any]:
        return {**super().default_search_config, "stop_after": None}

    @property
    def default_state_dict(self) -> dict[str, Any]:
        return {"tried": 0}

    def before_search(self) -> None:
        self.widths = {n: block.fc1.out_features for n, block in elastic_blocks(self.model).items()}
        self.rest = sum(p.numel() for p in self.model.parameters()) - self.costs(self.widths, 0)
        smallest = dict.fromkeys(self.widths, min(CHOICES))
        self.bound(
            {"params": self.costs(self.widths, self.rest)},
            {"params": self.costs(smallest, self.rest)},
            names=["params"],
        )

    def run_search(self) -> None:
        with torch.no_grad():
            self.set_widths(self.widths)
            target = self.model(self.dummy_input)
            every = list(itertools.product(CHOICES, repeat=len(self.widths)))
            for number, values in enumerate(every):
                if number < self.tried:
                    continue
                if number == self.config["stop_after"]:
                    raise KeyboardInterrupt
                if self.exhausted:
                    break
                self.visit(dict(zip(self.widths, values, strict=True)), target, len(every))
                self.tried = number + 1
                self.save_search_checkpoint()

    def visit(self, widths: dict[str, int], target: torch.Tensor, total: int) -> None:
        self.set_widths(widths)
        if self.config["score_func"] or self.config["loss_func"]:
            score = self.score()
        else:
            score = -float((self.model(self.dummy_input) - target).square().mean())
        costs = {"params": float(self.costs(widths, self.rest))}
        self.record(costs, score, widths, total=total)
        fits = self.bounds is not None and self.bounds.satisfied_by(costs)
        if fits and score > self.best.get("score", float("-inf")):
            self.best = {"subnet": widths, "score": score, "costs": costs}

    def after_search(self) -> None:
        self.set_widths(self.best["subnet"])

    def costs(self, widths: dict[str, int], rest: int) -> int:
        blocks = elastic_blocks(self.model)
        return rest + sum(w * (2 * blocks[n].fc1.in_features + 1) for n, w in widths.items())

    def set_widths(self, widths: dict[str, int]) -> None:
        for name, width in widths.items():
            self.model.get_submodule(name).width = width


class ElasticMode(WidthsMode):
    """Let blocks use a part of their hidden units, and search which."""

    name = "elastic"
    search_algorithm = ElasticSearcher
    export_mode = "export_elastic"


class ExportElasticMode(ExportWidthsMode):
    """Cut hidden units that are not used."""

    name = "export_elastic"


def search_registry() -> ModeRegistry:
    return ModeRegistry([ElasticMode, ExportElasticMode])
