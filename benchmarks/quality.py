# SPDX-License-Identifier: Apache-2.0
"""What modewright's recipes cost and lose, beside what other tools do on the same tokens.

    python benchmarks/workspace.py WORKSPACE
    python benchmarks/quality.py WORKSPACE --results FOLDER [--only PATTERN] [--table]

runs every row of :data:`ROWS` in a process of its own (one thread; a row whose result is in the
folder is not run again) and prints a table of all results there, those of
``benchmarks/peers/run.py`` too. ``--table`` runs nothing. A row is measured by the same code as the
peers: ``benchmarks/peers/measure.py``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MOST_WRITTEN = 128  # windows that a recipe lets the model write
sys.path.insert(0, str(HERE / "peers"))

ROWS = [
    # scheme by the peers' names, recipe, more
    "w4a16_g64_asym int4",
    "w4a16_g64_asym int4-best",
    "w3a16_g64_asym int3",
    "w3a16_g64_asym int3-best",
    "w2a16_g64_asym int2-best",
    "w4a16 int4-channel-best",
    "w8a8 int8",
    "w8a8 int8-best",
    "fp8 fp8",
    "fp8 fp8-best",
    "nvfp4 nvfp4",
    "nvfp4 nvfp4-best",
    "mxfp4 mxfp4",
    "mxfp4 mxfp4-best",
    "w4a16_g64_asym int4-encoder-best --minilm",
    "w3a16_g64_asym int3-encoder-best --minilm",
    "w8a8 int8-best --minilm",
    # calibrated on text that the model wrote itself
    "w4a16_g64_asym int4@self",
    "w3a16_g64_asym int3@self",
]


def optimize(task: Any, model: Any) -> Any:
    """Apply the steps of a recipe to a model, with the workspace's calibration data."""
    import modewright
    from modewright.recipes.loader import load_recipe

    name, _, source = task.algorithm.partition("@")
    recipe = load_recipe(name)
    batches = calibration(task, model, recipe.calibration, only_self=source == "self")
    for step in recipe.steps:
        if step.mode in ("export_quantize", "export_sparse", "compress"):
            continue
        config = dict(step.config)
        if task.minilm and step.mode == "quantize":
            config |= {"ignore": [], "targets": ["encoder.layer.*"]}
        uses_data = modewright.default_registry[step.mode].uses_calibration
        data = {"calibration": batches} if uses_data else {}
        modewright.apply_mode(model, (step.mode, config), mode_kwargs=data)
    return model


def calibration(task: Any, model: Any, text: Any, only_self: bool) -> list[dict[str, Any]]:
    """Return the workspace's calibration data, and what a recipe adds to it.

    Args:
        task: The row.
        model: The original, which writes text if the recipe wants some.
        text: The recipe's calibration data.
        only_self: Take text that the model writes instead of the workspace's.
    """
    from modewright.calibration.augmentation import more_windows
    from modewright.calibration.self_text import generate_windows

    if task.minilm:
        batches = task.calibration()
        count = round(text.augmented * len(batches) / text.windows)
        ids = [batch["input_ids"] for batch in batches]
        special = task.tokenizer().all_special_ids
        more = more_windows(model, ids, count=count, special=special)
        pairs = [(batches[index % len(batches)], row) for index, row in enumerate(more)]
        return batches + [{**batch, "input_ids": row} for batch, row in pairs]
    task.windows = min(task.windows, text.windows)
    task.written = round(text.augmented * task.windows / text.windows)
    if task.written:
        write_windows(task, model)
    batches = task.calibration()
    if only_self:
        length = batches[0]["input_ids"].shape[1]
        rows = generate_windows(model, count=len(batches), length=length, seed=0).split(1)
        batches = [{"input_ids": row} for row in rows]
    return batches


def write_windows(task: Any, model: Any) -> None:
    """Let the model write windows into the workspace, where every row finds them, peers' too."""
    from measure import WRITTEN, cpu_seconds
    from safetensors.torch import save_file

    from modewright.calibration.self_text import generate_windows

    file = task.workspace / WRITTEN
    if file.exists():
        return
    spent = cpu_seconds()
    length = task.tensor("calibration").shape[1]
    rows = generate_windows(model, count=MOST_WRITTEN, length=length, seed=0)
    spent = cpu_seconds() - spent
    task.cpu_before -= spent  # each row counts its part of it
    save_file({"windows": rows}, file, {"cpu_seconds": str(spent)})


def table(folder: Path) -> str:
    """Return all results of a folder as a table in Markdown, by scheme, the best first."""
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    lines = [
        "| model | scheme | tool | algorithm | loss increase | KL | CPU s | peak GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=_order):
        increases, errors = row.get("loss_increase", {}), row.get("standard_error", {})
        quality = " / ".join(
            f"{increases[text]:.4f}" + (f" ± {errors[text]:.4f}" if text in errors else "")
            for text in sorted(increases)
        )
        quality = quality or f"cosine {row['similarity']:.4f}"
        divergence = " / ".join(f"{value:.4f}" for _, value in sorted(row.get("kl", {}).items()))
        lines.append(
            f"| {row['model']} | {row['scheme']} | {row['peer']} | {algorithm_of(row)} "
            f"| {quality} | {divergence} | {row['cpu_seconds']:.0f} | {row['peak_gb']:.1f} |"
        )
    return "\n".join(lines)


def algorithm_of(row: dict[str, Any]) -> str:
    """Return the algorithm of a row, and which windows another tool got besides the text's."""
    more = row.get("written", 0) if row["peer"] != "modewright" else 0
    return row["algorithm"] + (f" + {more} written" if more else "")


def _order(row: dict[str, Any]) -> tuple[str, str, float]:
    increases = row.get("loss_increase", {})
    value = sum(increases.values()) if increases else -row.get("similarity", 0.0)
    return row["model"], row["scheme"].removesuffix("_asym"), value


def main() -> None:
    """Run the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", default="*", help="a pattern of recipes")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    for row in () if options.table else ROWS:
        scheme, recipe, *more = row.split()
        name = "-".join(["modewright", scheme, recipe, *(m.strip("-") for m in more)])
        output = options.results / f"{name}.json"
        if output.exists() or not fnmatch.fnmatch(recipe, options.only):
            continue
        command = [sys.executable, str(HERE / "quality_row.py"), str(options.workspace)]
        command += ["--scheme", scheme, "--algorithm", recipe, "--output", str(output), "--kl"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *more], check=True, env=environment)
    print(table(options.results))


if __name__ == "__main__":
    main()
