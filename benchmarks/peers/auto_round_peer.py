# SPDX-License-Identifier: Apache-2.0
"""auto-round: learned rounding and ranges, block by block.

Algorithms: ``auto_round`` (50 iterations, batches of 2 windows) and ``rtn`` (0 iterations).
"""

from __future__ import annotations

import measure
import torch
from auto_round import AutoRound

ITERATIONS = {"auto_round": 50, "rtn": 0}


def optimize(task: measure.Task, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with weights rounded to the grid, in float32."""
    windows = [example["input_ids"] for example in task.calibration()]
    tool = AutoRound(
        model,
        task.tokenizer(),
        bits=task.scheme.bits,
        group_size=task.scheme.group or -1,
        sym=task.scheme.symmetric,
        iters=ITERATIONS[task.algorithm],
        dataset=windows,
        nsamples=len(windows),
        seqlen=windows[0].shape[1],
        batch_size=2,
        device_map="cpu",
        amp=False,
    )
    return tool.quantize()[0]


if __name__ == "__main__":
    measure.run("auto-round", optimize)
