# SPDX-License-Identifier: Apache-2.0
"""How time and memory of a mode that goes block by block grow with the depth of the network.

Llamas of 4 to 32 blocks with random weights go through ``quantize`` and a mode, each in a fresh
child process. Time is seconds of processor time (all threads). Memory is the highest resident set
above that of the process with model and data, which ran once before; "stays" is the part of it that
the model keeps afterwards (scales and codes), "works" the rest.

    python benchmarks/scaling.py [--mode gptq] [--scheme w4a16] [--depths 4 8 16 32] [--json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

HIDDEN, WINDOWS, LENGTH, VOCABULARY = 256, 8, 128, 1000
CONFIGS: dict[str, dict[str, Any]] = {
    "learned_rounding": {"iterations": 20},
    "lsq": {"epochs": 1},
}
MIB = 2**20


def measure(mode: str, scheme: str, depth: int) -> dict[str, float]:
    """Convert one model in this process; return processor seconds and bytes of memory."""
    import psutil
    import torch
    import transformers

    import modewright
    from modewright.run.metering import Meter

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    batches = list(torch.randint(VOCABULARY, (WINDOWS, 1, LENGTH)))
    with torch.no_grad():
        model(batches[0])
    weights = _bytes(model)
    before = psutil.Process().memory_info().rss
    started = time.process_time()
    steps = [("quantize", {"scheme": scheme, "ignore": ["lm_head"]}), (mode, CONFIGS.get(mode, {}))]
    with Meter(interval=0.002) as meter:
        modewright.apply_mode(model, steps, mode_kwargs={"calibration": batches})
    return {
        "depth": depth,
        "seconds": time.process_time() - started,
        "peak": meter.peak_memory - before,
        "stays": _bytes(model) - weights,
    }


def _bytes(model: Any) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def table(rows: list[dict[str, float]]) -> str:
    """Return one line for every depth."""
    head = ["blocks", "seconds", "per block", "peak memory", "stays", "works"]
    lines = ["".join(f"{text:>13}" for text in head)]
    lines.append("-" * len(lines[0]))
    for row in rows:
        cells = [f"{row['depth']:.0f}", f"{row['seconds']:.1f} s"]
        cells.append(f"{row['seconds'] / row['depth']:.2f} s")
        works = row["peak"] - row["stays"]
        cells += [f"{size / MIB:.1f} MiB" for size in (row["peak"], row["stays"], works)]
        lines.append("".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Measure every depth in a child process and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mode", default="gptq")
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(measure(options.mode, options.scheme, options.child)))
        return
    rows = []
    for depth in options.depths:
        command = [sys.executable, __file__, "--mode", options.mode, "--scheme", options.scheme]
        done = subprocess.run(
            [*command, "--child", str(depth)], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
