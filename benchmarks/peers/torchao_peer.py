# SPDX-License-Identifier: Apache-2.0
"""torchao: rounding to nearest into its own integer tensors.

Algorithm: ``rtn``; schemes ``w8a8`` (dynamic, per token) and ``w8a16``.
"""

from __future__ import annotations

import measure
import torch
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

CONFIGS = {"w8a8": Int8DynamicActivationInt8WeightConfig, "w8a16": Int8WeightOnlyConfig}


def optimize(task: measure.Task, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with quantized weights."""
    if task.algorithm != "rtn" or task.scheme.name not in CONFIGS:
        raise ValueError(f"no {task.algorithm} for {task.scheme.name}")
    wanted = set(measure.linears(model, task.minilm))
    quantize_(model, CONFIGS[task.scheme.name](), filter_fn=lambda _, name: name in wanted)
    return model


if __name__ == "__main__":
    measure.run("torchao", optimize)
