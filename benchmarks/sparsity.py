# SPDX-License-Identifier: Apache-2.0
"""What zeros cost: modewright's sparse recipes beside what other tools do on the same tokens.

    python benchmarks/workspace.py WORKSPACE
    python benchmarks/sparsity.py WORKSPACE --results FOLDER [--only PATTERN] [--table]

Half of the weights zero anywhere (``s50``), two of four (``2to4``), and two of four with the others
in four bits (``2to4_w4a16_g64_asym``). Every row runs in a process of its own, on one thread; a row
whose result is in the folder is not run again, and ``--table`` runs nothing. Results of other tools
in the folder (of the form that ``benchmarks/peers/measure.py`` writes) are shown too, and for every
row its loss increase as a part of the best of theirs.
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

from quality import algorithm_of

HERE = Path(__file__).parent

ROWS = [
    # scheme, recipe
    "2to4 sparse-2to4",
    "2to4 sparse-2to4-best",
    "s50 sparse-50",
    "s50 sparse-50-best",
    "2to4_w4a16_g64_asym sparse-2to4-int4",
]


def table(folder: Path) -> str:
    """Return the results of a folder as a table in Markdown, by what is zero, the best first."""
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    found = [row for row in found if row["scheme"].startswith(("s50", "2to4"))]
    lines = [
        "| zeros | tool | algorithm | loss increase | of the best peer's | KL | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: (_kind(row), _mean(row))):
        peers = [_mean(r) for r in found if _kind(r) == _kind(row) and r["peer"] != "modewright"]
        ratio = f"{_mean(row) / min(peers):.2f}" if peers else ""
        increase = " / ".join(f"{value:.3f}" for _, value in sorted(row["loss_increase"].items()))
        divergence = " / ".join(f"{value:.3f}" for _, value in sorted(row["kl"].items()))
        lines.append(
            f"| {row['scheme']} | {row['peer']} | {algorithm_of(row)} | {increase} | {ratio} "
            f"| {divergence} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def _kind(row: dict[str, Any]) -> str:
    return str(row["scheme"]).removesuffix("_asym")


def _mean(row: dict[str, Any]) -> float:
    increases = row["loss_increase"].values()
    return float(sum(increases) / len(increases))


def main() -> None:
    """Run the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", default="*", help="a pattern of recipes")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    for row in () if options.table else ROWS:
        scheme, recipe = row.split()
        output = options.results / f"modewright-{scheme}-{recipe}.json"
        if output.exists() or not fnmatch.fnmatch(recipe, options.only):
            continue
        command = [sys.executable, str(HERE / "quality_row.py"), str(options.workspace)]
        command += ["--scheme", scheme, "--algorithm", recipe, "--output", str(output), "--kl"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment)
    print(table(options.results))


if __name__ == "__main__":
    main()
