# SPDX-License-Identifier: Apache-2.0
"""hqq: half-quadratic search of zero points, without data.

Algorithm: ``hqq``. Its integer grids are always asymmetric.
"""

from __future__ import annotations

import measure
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def optimize(task: measure.Task, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with layers of the tool."""
    if task.scheme.symmetric or task.scheme.input_bits != 16 or task.algorithm != "hqq":
        raise ValueError(f"hqq has no {task.algorithm} for {task.scheme.name}")
    for name in measure.linears(model, task.minilm):
        config = BaseQuantizeConfig(
            nbits=task.scheme.bits, group_size=task.scheme.group or None, axis=1
        )
        layer = HQQLinear(
            model.get_submodule(name), config, compute_dtype=torch.float32, device="cpu"
        )
        model.set_submodule(name, layer)
    return model


if __name__ == "__main__":
    measure.run("hqq", optimize)
