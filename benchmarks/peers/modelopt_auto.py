# SPDX-License-Identifier: Apache-2.0
"""Which integer scheme NVIDIA Model Optimizer's ``auto_quantize`` picks for each layer.

    python benchmarks/peers/modelopt_auto.py WORKSPACE --results FOLDER --bits 3.5 4.5 6

scores symmetric integers of 3, 4, 5, 6 and 8 bits in groups of 64 by its gradient method on the
calibration windows, solves for each bound, and writes ``modelopt-choice-BITS.json`` with the scheme
of every layer, by modewright's names. The 16 bits of a group's scale are declared to it. The output
layer, which is left alone, counts with 16 bits in its bound, so that is raised by what it takes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import measure
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.algorithms import QuantRecipe
from torch.nn import functional as F  # noqa: N812

SCHEMES = {3: "w3a16", 4: "w4a16", 5: "w5a16", 6: "w6a16", 8: "w8a16_g64"}
WINDOWS = 4


def format_of(bits: int) -> dict[str, Any]:
    """Return a candidate: integers in groups of 64, scales by its search for the least error."""
    weights = {"num_bits": bits, "block_sizes": {-1: 64, "type": "static"}}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weights, "enable": True},
        ],
        "algorithm": "max",
        "effective_bits": bits + 16 / 64,
    }


def choose(model: torch.nn.Module, batches: list[Any], bits: float, scores: Path) -> dict[str, str]:
    """Return by layer the scheme that is picked under a bound."""

    def loss(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = batch["input_ids"]
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    formats = [format_of(bits) for bits in SCHEMES]
    chosen_for = sum(model.get_submodule(n).weight.numel() for n in measure.linears(model, False))
    left = model.lm_head.weight.numel()
    bound = (bits * chosen_for + 16 * left) / (chosen_for + left)
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": bound},
        quantization_formats=formats,
        data_loader=batches,
        forward_step=lambda model, batch: model(**batch, use_cache=False),
        loss_func=loss,
        disabled_layers="*lm_head*",
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        checkpoint=str(scores),
    )
    names = {QuantRecipe(quant_cfg=None): "none"}
    found: dict[str, str] = {}
    for group, recipe in state["best"]["recipe"].items():
        scheme = names.get(recipe) or scheme_of(recipe)
        for path in state["candidate_stats"][group]["module_names"]:
            if "lm_head" not in path:
                found[path] = scheme
    return found


def scheme_of(recipe: Any) -> str:
    """Return modewright's name of a candidate."""
    for entry in recipe.config.quant_cfg:
        entry = entry if isinstance(entry, dict) else entry.model_dump()
        attributes = entry.get("cfg")
        bits = (
            attributes.get("num_bits")
            if isinstance(attributes, dict)
            else getattr(attributes, "num_bits", None)
        )
        if entry["quantizer_name"] == "*weight_quantizer" and bits in SCHEMES:
            return SCHEMES[bits]
    raise RuntimeError(f"a candidate without weights: {recipe}")


def main() -> None:
    """Read the command line, choose, and write one file for each bound."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.5, 4.5, 6.0])
    options = parser.parse_args()
    folder = options.workspace / "model"
    task = measure.Task(options.workspace, measure.Scheme("w4a16"), "", False, WINDOWS, folder)
    batches = task.calibration()
    options.results.mkdir(parents=True, exist_ok=True)
    for bits in options.bits:
        spent = measure.cpu_seconds()
        chosen = choose(task.load(), batches, bits, options.results / "modelopt-scores.pth")
        result = {
            "bits": bits,
            "version": measure.version("nvidia-modelopt"),
            "cpu_seconds": measure.cpu_seconds() - spent,
            "chosen": chosen,
        }
        path = options.results / f"modelopt-choice-{bits:g}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
