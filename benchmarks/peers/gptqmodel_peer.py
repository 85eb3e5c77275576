# SPDX-License-Identifier: Apache-2.0
"""GPTQModel: GPTQ, its own way.

Algorithm: ``gptq``. The tool quantizes a folder and writes another one, which runs in half
precision only. To compare numbers and not kernels, the codes are read from that folder and put into
the float32 model: ``(code - zero) * scale``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it fails on two cores otherwise

import measure
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors import safe_open


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes in 32-bit words, lowest bits first: ``[n, m]`` -> ``[n * 32 / bits, m]``."""
    shifts = torch.arange(0, 32, bits)[:, None]
    codes = (words.unsqueeze(1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(0, 1)


def weights(folder: Path, bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the path of each quantized layer and its weight, ``[out, in]``."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - it is no dict
                layer, _, kind = name.rpartition(".")
                if kind != "qweight":
                    continue
                codes = unpacked(shard.get_tensor(name), bits)
                zeros = unpacked(shard.get_tensor(f"{layer}.qzeros").T.contiguous(), bits).T
                zeros = (zeros + 1) & ((1 << bits) - 1)  # the format stores one less
                groups = shard.get_tensor(f"{layer}.g_idx").long()
                scale = shard.get_tensor(f"{layer}.scales").float()
                yield layer, ((codes - zeros[groups]) * scale[groups]).T.contiguous()


@torch.no_grad()
def optimize(task: measure.Task, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with weights rounded to the grid, in float32."""
    if task.scheme.bits not in (2, 4, 8) or task.minilm or task.algorithm != "gptq":
        raise ValueError(f"no {task.algorithm} for {task.scheme.name} here")
    config = QuantizeConfig(
        bits=task.scheme.bits,
        group_size=task.scheme.group or -1,
        sym=task.scheme.symmetric,
        format="gptq",
    )
    tool = GPTQModel.load(str(task.folder), config, device="cpu")
    rows = [{k: v[0].tolist() for k, v in row.items()} for row in task.calibration()]
    tool.quantize(rows, batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        tool.save(folder)
        for layer, weight in weights(Path(folder), task.scheme.bits):
            model.get_submodule(layer).weight.copy_(weight)
    return model


if __name__ == "__main__":
    measure.run("gptqmodel", optimize)
