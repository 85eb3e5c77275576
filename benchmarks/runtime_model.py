# SPDX-License-Identifier: Apache-2.0
"""How fast packed models are from end to end, and what they lose: decoding, prefill, loss.

The original in float32 and bfloat16, the same network with its linear layers computing nothing
(what the Python around them costs), and what recipes make of it, in turn in one process, on one
thread. Seconds are those of the processor, so that other work on the machine does not count; the
median of the repetitions, and the shortest. The loss is compared with that of the same weights and
quantized activations simulated in float32: the portable backend, as the model with quantizers has
it.

    python benchmarks/runtime_model.py WORKSPACE [--recipes int4-packed int8-packed] [--json]
        [--repeats 7] [--tokens 8] [--prompt 64] [--no-loss] [--static] [--compile]
        [--bfloat16]

WORKSPACE keeps the optimized models between calls.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modewright
from modewright.evaluation.language import evaluate_language
from modewright.integrations import transformers as hf
from modewright.integrations.generation import Decoding, prefill
from modewright.recipes.loader import load_recipe
from modewright.run.bench import weight_bytes
from modewright.run.data import load_data
from modewright.run.subject import open_subject
from modewright.runtime.backends.choice import using

MODEL = "demo:smollm2"
LENGTH = 512  # of a prefill


class Nothing(nn.Module):
    """Takes the place of a linear layer and computes nothing: what is left is all else."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features = layer.out_features
        self.kept: dict[Any, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros of the right shape."""
        shape = (*x.shape[:-1], self.out_features)
        if shape not in self.kept:
            self.kept[shape] = torch.zeros(shape, dtype=x.dtype)
        return self.kept[shape]


def without_linear_layers(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose linear layers compute nothing."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Nothing(layer))
    return model


def packed(recipe: str, workspace: Path) -> Path:
    """Return the folder of an optimized model, made if it is not there."""
    folder = workspace / recipe
    if not folder.is_dir():
        modewright.optimize(MODEL, recipe, output=folder)
    return folder


def losses_of(models: dict[str, Any], folders: dict[str, Path], subject: Any) -> dict[str, Any]:
    """Return the loss of the original and of packed models, as they run and simulated."""
    recipe = load_recipe(next(iter(folders)))
    windows = load_data(recipe, subject, uses_calibration=False).evaluation
    assert windows is not None
    found = {}
    found["fp32"] = evaluate_language(models["fp32"], windows).loss
    for name in folders:
        found[name] = evaluate_language(models[name], windows).loss
        with using("portable"):
            found[f"{name}, simulated"] = evaluate_language(models[name], windows).loss
    return found


def processor_seconds(work: Callable[[], object]) -> float:
    """Return how long the processor took."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def static_cache(model: Any, tokens: int) -> Any:
    """Return a cache of fixed size."""
    import transformers

    return transformers.StaticCache(config=model.config, max_cache_len=tokens)


def measure(models: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure all models in turn."""
    tokens: int = options.tokens
    most = max(LENGTH, options.prompt)
    text = torch.randint(0, 1000, (1, most), generator=torch.Generator().manual_seed(0))
    prompt, text = text[:, : options.prompt], text[:, :LENGTH]
    seen: dict[str, dict[str, list[float]]] = {n: {"decode": [], "prefill": []} for n in models}
    for repeat in range(options.repeats + 1):
        for name, model in models.items():
            size = options.prompt + tokens + 2
            run = Decoding(model, prompt, static_cache(model, size) if options.static else None)
            run.step()
            decode = processor_seconds(lambda run=run: [run.step() for _ in range(tokens)]) / tokens
            fill = processor_seconds(lambda model=model: prefill(model, text))
            if repeat:  # the first one warms up
                seen[name]["decode"].append(decode)
                seen[name]["prefill"].append(fill)
    return seen


def report(rows: list[dict[str, Any]]) -> str:
    """Return one line for every model."""
    head = ["decode", "best", "tokens/s", "x fp32", "prefill", "best", "x fp32", "MB", "loss"]
    lines = [f"{'':24}" + "".join(f"{text:>10}" for text in head) + f"{'- simulated':>13}"]
    for row in rows:
        cells = [f"{row['decode'] * 1e3:.1f} ms", f"{row['decode_best'] * 1e3:.1f}"]
        cells += [f"{1 / row['decode']:.0f}", f"{row['decode_ratio']:.2f}"]
        cells += [f"{row['prefill'] * 1e3:.0f} ms", f"{row['prefill_best'] * 1e3:.0f}"]
        cells += [f"{row['prefill_ratio']:.2f}", f"{row['bytes'] / 1e6:.1f}"]
        cells.append("" if row["loss"] is None else f"{row['loss']:.4f}")
        difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        line = "".join(f"{cell:>10}" for cell in cells) + f"{difference:>13}"
        lines.append(f"{row['name']:24}{line}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["int4-packed", "int8-packed"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens before those decoded")
    parser.add_argument("--no-loss", action="store_true")
    parser.add_argument("--static", action="store_true", help="a cache of fixed size")
    parser.add_argument("--compile", action="store_true", help="packed models compiled, too")
    parser.add_argument("--bfloat16", action="store_true", help="and packed models in bfloat16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders = {name: packed(name, options.workspace) for name in options.recipes}
    subject = open_subject(MODEL, registry=modewright.default_registry)
    original = subject.model
    models: dict[str, Any] = {
        "fp32": original,
        "bf16": copy.deepcopy(original).bfloat16(),
        "no linear layers": without_linear_layers(original),
    }
    for name, folder in folders.items():
        models[name] = modewright.restore(hf.build_from_config(folder), folder).eval()
        if options.bfloat16:
            models[f"{name}, bf16"] = copy.deepcopy(models[name]).bfloat16()
        if options.compile:
            models[f"{name}, compiled"] = torch.compile(models[name])
    losses = {} if options.no_loss or not folders else losses_of(models, folders, subject)
    seen = measure(models, options)
    rows = []
    for name, model in models.items():
        row: dict[str, Any] = {"name": name, "bytes": weight_bytes(model), "loss": losses.get(name)}
        for kind, samples in seen[name].items():
            row[kind] = statistics.median(samples)
            row[f"{kind}_best"] = min(samples)
            row[f"{kind}_ratio"] = statistics.median(seen["fp32"][kind]) / row[kind]
        other = losses.get(f"{name}, simulated")
        row["difference"] = None if other is None else row["loss"] - other
        rows.append(row)
    print(json.dumps(rows, indent=1) if options.json else report(rows))


if __name__ == "__main__":
    main()
