# SPDX-License-Identifier: Apache-2.0
"""How fast one packed linear layer is, by its shape, the rows of activations, and the backend.

    python benchmarks/runtime.py [--shapes 576x1536 ...] [--rows 1 8 64 512] [--weights NAME ...]
        [--all] [--seconds 0.4] [--json]

Everything runs on one thread in one process, in turns, and is timed by the processor's clock for
that thread, so that other work on the machine counts little. Weights are cold: each candidate has
so many copies of its weight that together they are larger than any cache, and goes through them.
A figure is the median. ``x fp32`` and ``x bf16`` are ratios to ``F.linear`` in float32 and to
oneDNN's product with a bfloat16 weight in its own order, the fastest that torch has without
quantization. ``GB/s`` are the bytes of the weight as it is stored, to be compared with ``dot`` and
``copy`` of the same run. ``error`` is that of the output against dequantizing (and quantizing
activations as the scheme says) in float32.

``--all`` times every backend that does not refuse; otherwise only the one that is picked. ONNX
Runtime, OpenVINO and torchao are in the table where they can be imported: see
``peers/single_layers.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from modewright.runtime.backends import Case, backends, choose
from modewright.runtime.backends.portable import portable_linear
from modewright.runtime.huge_pages import HugePages
from modewright.runtime.packed_weight import PackedSpec, PackedWeight
from peers.single_layers import PEERS

SHAPES = ("576x1536", "2048x2048", "4096x4096", "4096x11008")  # inputs x outputs
ROWS = (1, 8, 64, 512)
COLD_BYTES = 96e6  # three times the last level cache
WEIGHTS = {
    # name: (spec, activations)
    "int4 g64": ({"format": "int4", "granularity": "group", "group_size": 64}, None),
    "int8": ({"format": "int8"}, None),
    "int8, int8 activations": ({"format": "int8"}, "int8_token"),
    "int4 g64, int8 activations": (
        {"format": "int4", "granularity": "group", "group_size": 64},
        "int8_token",
    ),
    "int4 g32": ({"format": "int4", "granularity": "group", "group_size": 32}, None),
    "int4 g128": ({"format": "int4", "granularity": "group", "group_size": 128}, None),
    "uint4 g64": ({"format": "uint4", "granularity": "group", "group_size": 64}, None),
    "int3 g64": ({"format": "int3", "granularity": "group", "group_size": 64}, None),
    "uint2 g64": ({"format": "uint2", "granularity": "group", "group_size": 64}, None),
    "nvfp4": (
        {
            "format": "fp4_e2m1",
            "granularity": "group",
            "group_size": 16,
            "scale_format": "e4m3",
            "scale_dtype": "float8_e4m3fn",
        },
        None,
    ),
    "mxfp4": (
        {
            "format": "fp4_e2m1",
            "granularity": "group",
            "group_size": 32,
            "scale_format": "e8m0",
            "scale_dtype": "uint8",
        },
        None,
    ),
    "fp8": ({"format": "fp8_e4m3"}, None),
    "fp8, fp8 activations": ({"format": "fp8_e4m3"}, "fp8_token"),
    "nf4 g64": ({"format": "nf4", "granularity": "group", "group_size": 64}, None),
}
DEFAULT = ("int4 g64", "int8", "int8, int8 activations")


@dataclass
class Candidate:
    """Something to time: calls that do the same with different copies of a weight."""

    weights: str
    backend: str
    calls: list[Callable[[], Any]]
    nbytes: int
    error: float = 0.0


@dataclass
class Row:
    """One line of the table."""

    shape: str
    rows: int
    weights: str
    backend: str
    microseconds: float
    x_fp32: float
    x_bf16: float
    gigabytes: float
    gigaops: float
    error: float


def copies(nbytes: int) -> int:
    """Return how many weights of that size no cache holds."""
    return max(2, int(-(-COLD_BYTES // nbytes)))


def roofline(size: int = 1 << 26) -> dict[str, float]:
    """Return GB/s of reading (a dot product) and of copying, on one thread."""
    first, second = torch.ones(size), torch.ones(size)
    found = {}
    for name, run in {
        "dot": lambda: torch.dot(first, second),
        "copy": lambda: first.copy_(second),
    }.items():
        taken = []
        for _ in range(7):
            started = time.thread_time()
            run()
            taken.append(time.thread_time() - started)
        found[name] = 2 * first.nbytes / statistics.median(taken) / 1e9
    return found


def dense(x: torch.Tensor, outputs: int) -> list[Candidate]:
    """Return the two that everything is compared with."""
    inputs = x.shape[1]
    full = [torch.randn(outputs, inputs) for _ in range(copies(4 * outputs * inputs))]
    half = x.to(torch.bfloat16)
    reordered = [
        torch.ops.mkldnn._reorder_linear_weight(
            torch.randn(outputs, inputs).to(torch.bfloat16), len(x)
        )
        for _ in range(copies(2 * outputs * inputs))
    ]
    product = torch.ops.mkldnn._linear_pointwise
    return [
        Candidate(
            "float32", "F.linear", [lambda w=w: F.linear(x, w) for w in full], 4 * full[0].numel()
        ),
        Candidate(
            "bfloat16",
            "oneDNN packed",
            [lambda w=w: product(half, w, None, "none", [], "") for w in reordered],
            2 * full[0].numel(),
        ),
    ]


def random_weight(spec: PackedSpec) -> PackedWeight:
    """Return a weight that looks like a quantized one: codes around the middle, similar scales."""
    n, k = spec.shape
    largest = (1 << spec.num_bits) - 1
    codes = torch.randn(n, k).mul_(largest / 6).add_(largest / 2).round_().clamp_(0, largest)
    codes = codes.to(torch.uint8) ^ spec.code_offset
    if spec.format.startswith("fp8"):
        codes &= 0xBF  # no NaN
    scale = torch.rand(spec.scale_shape) * 0.01 + 0.01
    level = None
    if spec.scale_format == "e8m0":
        scale = torch.exp2(torch.randint(-8, -5, spec.scale_shape).float())
    if spec.scale_format == "e4m3":
        scale, level = (scale * 1e4).to(torch.float8_e4m3fn).float(), torch.tensor(1e-4)
    zero = None
    if spec.has_zero_point:
        zero = torch.full(spec.scale_shape, float(largest // 2))
    return PackedWeight.from_codes(spec, codes, scale, zero, level)


def packed(name: str, x: torch.Tensor, outputs: int, every: bool) -> list[Candidate]:
    """Return the backends to time for one kind of weight."""
    fields, act = WEIGHTS[name]
    spec = PackedSpec(shape=(outputs, x.shape[1]), **fields)
    weight = random_weight(spec)
    exact = portable_linear(x, weight, None, act, None)
    case = Case(spec, "cpu", x.dtype, act, len(x))
    picked = choose(case)
    found = []
    for backend in backends().values():
        slow = backend.name == "portable" and backend is not picked
        if backend.refuses(case) is not None or slow or not (every or backend is picked):
            continue
        memory = HugePages()  # as `compress` and restoring put them
        weights = [weight.map(torch.clone).map(memory.moved) for _ in range(copies(weight.nbytes))]
        ready = [backend.prepare(each) for each in weights]
        calls = [lambda r=r, b=backend: b.linear(x, r, None, act, None) for r in ready]
        error = float((calls[0]() - exact).norm() / exact.norm())
        label = backend.name + (" (picked)" if backend is picked and every else "")
        found.append(Candidate(name, label, calls, weight.nbytes, error))
    return found


def time_all(candidates: list[Candidate], seconds: float) -> list[float]:
    """Return the median seconds of a call of each, timed in turns."""
    taken: list[list[float]] = [[] for _ in candidates]
    places = [0] * len(candidates)
    for candidate in candidates:
        candidate.calls[0]()
    until = time.thread_time() + seconds * len(candidates)
    while time.thread_time() < until or len(taken[0]) < 5:
        for which, candidate in enumerate(candidates):
            turn = max(1, min(8, len(candidate.calls)))
            for _ in range(turn):
                call = candidate.calls[places[which] % len(candidate.calls)]
                places[which] += 1
                started = time.thread_time()
                call()
                taken[which].append(time.thread_time() - started)
    return [statistics.median(each) for each in taken]


def measure(shape: str, rows: int, names: list[str], every: bool, seconds: float) -> list[Row]:
    """Time everything for one shape and number of rows."""
    inputs, outputs = (int(size) for size in shape.split("x"))
    x = torch.randn(rows, inputs)
    candidates = dense(x, outputs)
    for name in names:
        candidates += packed(name, x, outputs, every)
    candidates += peers(x, outputs, names)
    medians = time_all(candidates, seconds)
    fp32, bf16 = medians[:2]
    work = 2e-9 * rows * inputs * outputs
    return [
        Row(
            shape,
            rows,
            candidate.weights,
            candidate.backend,
            taken * 1e6,
            fp32 / taken,
            bf16 / taken,
            candidate.nbytes / taken / 1e9,
            work / taken,
            candidate.error,
        )
        for candidate, taken in zip(candidates, medians, strict=True)
    ]


def peers(x: torch.Tensor, outputs: int, names: list[str]) -> list[Candidate]:
    """Return the peers that can be imported and multiply by such weights."""
    found = []
    for weights, library, width, make in PEERS:
        nbytes = int(outputs * x.shape[1] * width)
        calls = make(x, outputs, copies(nbytes)) if weights in names else None
        if calls is not None:
            found.append(Candidate(weights, library, calls, nbytes, float("nan")))
    return found


def render(rows: list[Row]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| shape | rows | weights | backend | µs | x fp32 | x bf16 | GB/s | GOP/s | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.shape} | {r.rows} | {r.weights} | {r.backend} | {r.microseconds:.0f} | "
        f"{r.x_fp32:.1f} | {r.x_bf16:.2f} | {r.gigabytes:.1f} | {r.gigaops:.0f} | {r.error:.1e} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=DEFAULT)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    limits = roofline()
    print(
        f"one thread: dot {limits['dot']:.0f} GB/s, copy {limits['copy']:.0f} GB/s; "
        f"load {os.getloadavg()[0]:.1f}",
        file=sys.stderr,
    )
    rows = []
    with torch.no_grad():
        for shape in options.shapes:
            for count in options.rows:
                rows += measure(shape, count, options.weights, options.all, options.seconds)
                print(f"{shape}, {count} rows: done", file=sys.stderr, flush=True)
    print(json.dumps([asdict(row) for row in rows]) if options.json else render(rows))


if __name__ == "__main__":
    main()
