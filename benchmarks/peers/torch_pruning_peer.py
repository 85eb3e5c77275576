# SPDX-License-Identifier: Apache-2.0
"""torch-pruning on the small network: ``python torch_pruning_peer.py FOLDER METHOD``.

Methods: ``magnitude``, ``bn_scale``, ``taylor``, ``hessian``, ``lamp``; all of them prune globally
and in steps until half of the arithmetic is left.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp  # type: ignore[import-not-found]
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
import pruning_cnn as cnn

IMPORTANCES = {
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn_scale": lambda: tp.importance.BNScaleImportance(),
    "taylor": lambda: tp.importance.GroupTaylorImportance(),
    "hessian": lambda: tp.importance.GroupHessianImportance(),
    "lamp": lambda: tp.importance.LAMPImportance(p=2),
}
STEPS = 100


def prune(model: cnn.SmallResNet, digits: cnn.Digits) -> Any:
    """Prune step by step until the arithmetic is halved."""
    method = sys.argv[2]
    importance = IMPORTANCES[method]()
    example = torch.zeros(1, 1, 28, 28)
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        global_pruning=True,
        pruning_ratio=0.9,
        max_pruning_ratio=0.9,
        iterative_steps=STEPS,
        ignored_layers=[model.head],
        round_to=None,
    )
    target = cnn.flops(model) / 2
    while cnn.flops(model) > target:
        _gather(model, digits, importance, method)
        pruner.step()
    return model.eval()


def _gather(model: Any, digits: cnn.Digits, importance: Any, method: str) -> None:
    model.zero_grad()
    batches = digits.batches("train")[:16]
    if method == "taylor":
        for x, y in batches:
            functional.cross_entropy(model(x), y).backward()
    elif method == "hessian":
        importance.zero_grad()
        for x, y in batches[:2]:
            losses = functional.cross_entropy(model(x), y, reduction="none")
            for one in losses:
                model.zero_grad()
                one.backward(retain_graph=True)
                importance.accumulate_grad(model)


if __name__ == "__main__":
    cnn.main(f"torch-pruning {sys.argv[2]}", prune)
