# SPDX-License-Identifier: Apache-2.0
"""llm-compressor: rounding to nearest, GPTQ and SmoothQuant; SparseGPT and Wanda.

Algorithms: ``rtn``, ``gptq``, ``smoothquant`` (then ``rtn``); ``sparsegpt`` and ``wanda``, and then
GPTQ where the scheme has both zeros and codes (``2to4_w4a16_g64_asym``). The tool leaves a model
that rounds in a wrapped forward of the layers. It is measured like that, without saving it; only
the weights are rounded once instead of in each forward, with the tool's own function.
"""

from __future__ import annotations

from typing import Any

import measure
import torch
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

SPARSE = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
PRESETS = {"fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4", "mxfp4": "MXFP4"}


def numbers(scheme: measure.Scheme, targets: list[str]) -> dict[str, Any]:
    """Say the scheme in the tool's words."""
    if scheme.integer is None:
        return {"targets": targets, "scheme": PRESETS[scheme.name]}
    group: dict[str, Any] = {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group" if scheme.group else "channel",
            "group_size": scheme.group or None,
        },
    }
    if scheme.input_bits < 16:
        group["input_activations"] = {
            "num_bits": scheme.input_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {"config_groups": {"group_0": group}}


@torch.no_grad()
def fold(model: torch.nn.Module) -> None:
    """Round the weights once and for all."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            rounded = forward_quantize(module, module.weight.data, "weight", scheme.weights)
            module.weight.data.copy_(rounded)
            module.quantization_scheme = scheme.model_copy(update={"weights": None})


def modifiers(task: measure.Task, model: torch.nn.Module) -> list[Any]:
    """Say what is to be done in the tool's words."""
    targets = measure.linears(model, task.minilm)
    if task.algorithm in SPARSE:
        structure = "2:4" if task.scheme.name.startswith("2to4") else "0:0"
        sparse = SPARSE[task.algorithm](sparsity=0.5, mask_structure=structure, targets=targets)
        if task.scheme.integer is None:
            return [sparse]
        return [sparse, GPTQModifier(**numbers(task.scheme, targets))]
    kind = GPTQModifier if task.algorithm == "gptq" else QuantizationModifier
    recipe: list[Any] = [kind(**numbers(task.scheme, targets))]
    if task.algorithm == "smoothquant":
        recipe.insert(0, SmoothQuantModifier())  # its defaults: strength 0.5
    return recipe


def optimize(task: measure.Task, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with quantized layers."""
    recipe = modifiers(task, model)
    data: dict[str, Any] = {}
    if task.algorithm != "rtn" or task.scheme.name == "nvfp4":
        rows = [{k: v[0].tolist() for k, v in row.items()} for row in task.calibration()]
        data = {"dataset": Dataset.from_list(rows), "num_calibration_samples": len(rows)}
    oneshot(model=model, tokenizer=task.tokenizer(), recipe=recipe, max_seq_length=512, **data)
    fold(model)
    return model


if __name__ == "__main__":
    measure.run("llmcompressor", optimize)
