# SPDX-License-Identifier: Apache-2.0
"""Mixed precision at 3.5, 4.5 and 6 effective bits, beside every uniform scheme of that size.

    python benchmarks/workspace.py WORKSPACE
    python benchmarks/auto_quantize.py WORKSPACE --results FOLDER [--only PATTERN] [--table]

measures every row of :data:`ROWS` in a process of its own (one thread; a row whose result is in the
folder is not run again) and prints a table of all results there. ``--table`` runs nothing. Rows:

``auto BITS STEPS``             our search under that bound, then the steps (modes with ``+``)
``uniform SCHEME STEPS``        one scheme for all layers, then the same steps
``same BITS STEPS``             our search among the candidates that nvidia-modelopt is given
``modelopt BITS STEPS``         the scheme that nvidia-modelopt's ``auto_quantize`` chose for each
                                layer, with our steps: run ``benchmarks/peers/modelopt_auto.py`` in
                                an environment of its own first, with the same ``--results``

Effective bits count scales and zero points. Scores are kept in the folder, so that the bounds share
them; the first row that needs them pays for them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))

BUDGETS = ("3.5", "4.5", "6")
CANDIDATES = {
    "auto": [
        "w2a16", "w3a16_asym", "w3a16_g32_asym", "w4a16_asym", "w4a16_g32_asym", "w5a16_asym",
        "w6a16_asym", "w8a16",
    ],
    "same": ["w3a16", "w4a16", "w5a16", "w6a16", "w8a16_g64"],
}  # fmt: skip
ROWS = [
    *(f"auto {bits} mse" for bits in BUDGETS),
    # the schemes of about that size
    "uniform w3a16_g32 mse",
    "uniform w3a16_g48_asym mse",
    "uniform w4a16_g32 mse",
    "uniform w4a16_g48_asym mse",
    "uniform w5a16_g24_asym mse",
    "uniform w6a16_channel mse",
    *(f"same {bits} mse" for bits in BUDGETS),
    *(f"modelopt {bits} mse" for bits in BUDGETS),
    "uniform w3a16_asym mse",
    "uniform w4a16_asym mse",
    "uniform nvfp4_w4a16 mse",
    "uniform w5a16_g16 mse",
]
SEARCH_WINDOWS = 4
MSE_WINDOWS = 8
MEASURED_WINDOWS = 12  # of each text


def optimize(row: str, task: Any, model: Any, results: Path) -> dict[str, Any]:
    """Quantize the model as a row says; return what to note of it."""
    import modewright

    kind, which, steps = row.split()
    batches = task.calibration()
    noted: dict[str, Any] = {}
    if kind == "uniform":
        config = {"scheme": which, "ignore": ["lm_head"]}
        modewright.apply_mode(model, ("quantize", config))
        noted["effective_bits"] = effective_bits(model, modewright.mode_state(model))
    elif kind == "modelopt":
        chosen = json.loads((results / f"modelopt-choice-{which}.json").read_text())
        by_scheme: dict[str, list[str]] = {}
        for path, scheme in chosen["chosen"].items():
            by_scheme.setdefault(scheme, []).append(path)
        rules = [{"targets": paths, "scheme": scheme} for scheme, paths in by_scheme.items()]
        modewright.apply_mode(model, ("quantize", {"scheme": "none", "rules": rules}))
        noted["effective_bits"] = effective_bits(model, modewright.mode_state(model))
        noted["search_cpu_seconds"] = chosen["cpu_seconds"]
    else:
        found = modewright.search(
            model,
            ("auto_quantize", {"candidates": CANDIDATES[kind], "ignore": ["lm_head"]}),
            {"effective_bits": float(which)},
            calibration=batches[:SEARCH_WINDOWS],
            checkpoint=results / f"scores-{kind}.safetensors",
        )
        noted["effective_bits"] = found.costs["effective_bits"]
        noted["predicted"] = -found.best["score"]
        noted["layers"] = {
            scheme: list(found.best["subnet"].values()).count(scheme) for scheme in CANDIDATES[kind]
        }
    for step in steps.split("+"):
        count = MSE_WINDOWS if step == "mse" else len(batches)
        modewright.apply_mode(model, step, mode_kwargs={"calibration": batches[:count]})
    return noted


def effective_bits(model: Any, state: dict[str, Any]) -> float:
    """Return the bits of each weight that is quantized, scales and zero points included."""
    from modewright.quantization.representation import SchemeConfig
    from modewright.quantization.size import layer_bits

    bits = numbers = 0
    for path, recorded in state["modes"][0]["metadata"]["layers"].items():
        layer = model.get_submodule(path)
        bits += sum(layer_bits(layer, SchemeConfig.model_validate(recorded)).values())
        numbers += layer.weight.numel()
    return bits / numbers


def loss_increases(task: Any, model: Any) -> dict[str, Any]:
    """Return by text the nats per token above the original, on the first windows of each."""
    import measure

    before = measure.original_losses(task)
    found = {}
    for name in task.texts():
        after = measure.losses(model, task.tensor(f"evaluation.{name}")[:MEASURED_WINDOWS])
        original = before[name][: len(after)]
        found[name] = (sum(after) - sum(original)) / len(after)
    return {"loss_increase": found, "measured_windows": MEASURED_WINDOWS}


def run_row(row: str, workspace: Path, results: Path) -> None:
    """Measure one row and write its JSON file."""
    import measure
    import torch

    import modewright

    torch.manual_seed(0)
    scheme = measure.Scheme("w4a16")  # what is quantized how is the row's to say
    task = measure.Task(workspace, scheme, row, False, 64, workspace / "model")
    model = task.load()
    cpu, wall = measure.cpu_seconds(), time.perf_counter()
    noted = optimize(row, task, model, results)
    cost = {
        "cpu_seconds": measure.cpu_seconds() - cpu,
        "wall_seconds": time.perf_counter() - wall,
    }
    modewright.apply_mode(model, "export_quantize")  # the same numbers, in plain layers
    measured = loss_increases(task, model.eval())
    result = {"row": row, "model": "smollm2", **noted, **measured, **cost}
    (results / f"{row.replace(' ', '-')}.json").write_text(json.dumps(result, indent=1) + "\n")


def table(folder: Path) -> str:
    """Return all results of a folder as a table in Markdown, by size."""
    lines = [
        "| row | effective bits | loss increase | mean | CPU s |",
        "|---|---|---|---|---|",
    ]
    rows = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    for row in sorted(
        (r for r in rows if "row" in r), key=lambda r: (r["effective_bits"], r["row"])
    ):
        increases = " / ".join(f"{v:.4f}" for _, v in sorted(row["loss_increase"].items()))
        mean = sum(row["loss_increase"].values()) / len(row["loss_increase"])
        lines.append(
            f"| {row['row']} | {row['effective_bits']:.3f} | {increases} | {mean:.4f} "
            f"| {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", default="*", help="a pattern of rows")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.row:
        run_row(options.row, options.workspace, options.results)
        return
    for row in () if options.table else ROWS:
        output = options.results / f"{row.replace(' ', '-')}.json"
        if output.exists() or not fnmatch.fnmatch(row, options.only):
            continue
        command = [sys.executable, __file__, str(options.workspace), "--row", row]
        command += ["--results", str(options.results)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment)
    print(table(options.results))


if __name__ == "__main__":
    main()
