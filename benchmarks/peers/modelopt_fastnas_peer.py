# SPDX-License-Identifier: Apache-2.0
"""nvidia-modelopt's fastnas on the small network.

``python modelopt_fastnas_peer.py FOLDER accuracy|loss``: what it scores subnets by. It counts
arithmetic by torchprofile, which has to be 0.0.4 for version 0.47, and needs torchvision.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import modelopt.torch.prune as mtp  # type: ignore[import-not-found]
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import pruning_cnn as cnn

DIVISOR = 4  # its own default, 32, leaves hardly a choice in a network this narrow
SPACE = {
    "nn.Conv2d": {"*": {"channel_divisor": DIVISOR}},
    "nn.Linear": {"*": {"feature_divisor": DIVISOR}},
    "nn.BatchNorm2d": {"*": {"feature_divisor": DIVISOR}},
}


def prune(model: cnn.SmallResNet, digits: cnn.Digits) -> Any:
    """Search for half of the arithmetic."""
    by = sys.argv[2]

    def score(found: Any) -> float:
        return (
            cnn.accuracy(found, digits, "validation")
            if by == "accuracy"
            else -cnn.loss(found, digits, "validation")
        )

    pruned, _ = mtp.prune(
        model=model,
        mode=[("fastnas", SPACE)],
        constraints={"flops": "50%"},
        dummy_input=torch.zeros(1, 1, 28, 28),
        config={
            "data_loader": digits.batches("train"),
            "score_func": score,
            "collect_func": lambda batch: batch[0],
        },
    )
    return pruned.eval()


if __name__ == "__main__":
    cnn.main(f"modelopt fastnas ({sys.argv[2]})", prune)
