# SPDX-License-Identifier: Apache-2.0
"""NVIDIA Model Optimizer: quantizers in the layers, calibrated on the windows.

Algorithms: ``max`` and ``smoothquant``; schemes ``fp8`` (per tensor, static), ``w8a8``, ``w8a16``,
``nvfp4`` and ``mxfp4``.
"""

from __future__ import annotations

import copy

import measure
import modelopt.torch.quantization as mtq
import torch

CONFIGS = {
    ("fp8", "max"): mtq.FP8_DEFAULT_CFG,
    ("w8a8", "max"): mtq.INT8_DEFAULT_CFG,
    ("w8a8", "smoothquant"): mtq.INT8_SMOOTHQUANT_CFG,
    ("w8a16", "max"): mtq.INT8_WEIGHT_ONLY_CFG,
    ("nvfp4", "max"): mtq.NVFP4_DEFAULT_CFG,
    ("mxfp4", "max"): mtq.MXFP4_DEFAULT_CFG,
}


def optimize(task: measure.Task, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with quantizers; the output layer is left alone by all these configs."""

    def calibrate(model: torch.nn.Module) -> None:
        for row in task.calibration():
            model(**row)

    config = copy.deepcopy(CONFIGS[task.scheme.name, task.algorithm])
    with torch.no_grad():
        return mtq.quantize(model, config, calibrate)


if __name__ == "__main__":
    measure.run("nvidia-modelopt", optimize)
