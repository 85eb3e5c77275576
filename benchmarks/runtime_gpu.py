# SPDX-License-Identifier: Apache-2.0
"""How fast packed weights are on a GPU: single layers, and a whole network that writes text.

    python benchmarks/runtime_gpu.py [--shapes 4096x4096 ...] [--rows 1 8 64 512 4096]
        [--weights NAME ...] [--layers 32] [--json]

Single layers: activations are bfloat16, what is compared with is ``F.linear`` with a bfloat16
weight. Weights are cold: each candidate has so many copies of its weight that together they are
larger than any cache, and goes through them in a CUDA graph, so that what Python costs does not
count. A figure is the median. ``GB/s`` are the bytes of the weight as it is stored, to be compared
with ``copy`` of the same run (bytes read and written). ``error`` is that of the output against
dequantizing (and quantizing activations as the scheme says) in float64.

The network is a Llama of the size of Llama-2-7B (``--layers`` of it; 0 leaves it out) with random
weights in bfloat16, and what ``quantize`` and ``compress`` make of it on the GPU: tokens per second
while it writes one text, as Transformers runs it and from a CUDA graph, and of a prompt of 2048.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import modewright
from modewright.integrations.generation import Decoding, cache_argument, prefill
from modewright.run.bench import weight_bytes
from modewright.runtime.backends import Case, choose
from modewright.runtime.backends.portable import portable_linear
from modewright.runtime.packed_weight import PackedSpec
from runtime import WEIGHTS, random_weight

SHAPES = ("2048x2048", "4096x4096", "4096x11008")  # inputs x outputs
ROWS = (1, 8, 64, 512, 4096)
DEFAULT = (
    "int4 g64",
    "uint4 g64",
    "uint2 g64",
    "int8",
    "int8, int8 activations",
    "fp8",
    "fp8, fp8 activations",
    "nvfp4",
)
COLD_BYTES = 200e6
PROMPT, PREFILL, TOKENS = 64, 2048, 32
DTYPE = torch.bfloat16


def graph_seconds(calls: list[Callable[[], Any]], repeats: int = 5) -> float:
    """Return the median seconds of a call, in a CUDA graph of all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    count = max(len(calls), 20)
    with torch.cuda.graph(graph):
        for index in range(count):
            calls[index % len(calls)]()
    graph.replay()
    taken = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / count / 1e3)
    return statistics.median(taken)


def copy_speed() -> float:
    """Return GB/s of copying, bytes read and written."""
    first = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    second = torch.empty_like(first)
    return 2 * first.nbytes / graph_seconds([lambda: second.copy_(first)]) / 1e9


def layer_rows(shape: str, counts: list[int], name: str) -> list[dict[str, Any]]:
    """Time one kind of weight for one shape and several numbers of rows."""
    inputs, outputs = (int(size) for size in shape.split("x"))
    dense = [torch.randn(outputs, inputs, device="cuda").to(DTYPE) for _ in range(6)]
    fields, act = WEIGHTS[name]
    spec = PackedSpec(shape=(outputs, inputs), **fields)
    weight = random_weight(spec).map(torch.Tensor.cuda)
    copies = max(2, min(100, int(COLD_BYTES // weight.nbytes) + 1))
    weights = [weight.map(torch.clone) for _ in range(copies)]
    found = []
    for rows in counts:
        x = torch.randn(rows, inputs, device="cuda").to(DTYPE)
        backend = choose(Case(spec, "cuda", DTYPE, act, rows))
        ready = [backend.prepare(each) for each in weights]
        base = graph_seconds([partial(F.linear, x, each) for each in dense])
        seconds = graph_seconds([partial(backend.linear, x, r, None, act, None) for r in ready])
        exact = portable_linear(x.double(), weight, None, act, None)
        error = (backend.linear(x, ready[0], None, act, None) - exact).norm() / exact.norm()
        found.append(
            {
                "shape": shape,
                "rows": rows,
                "weights": name,
                "backend": backend.name,
                "microseconds": seconds * 1e6,
                "bf16_microseconds": base * 1e6,
                "x_bf16": base / seconds,
                "gigabytes": weight.nbytes / seconds / 1e9,
                "error": float(error),
            }
        )
    return found


def random_llama(layers: int) -> nn.Module:
    """Return a Llama of the width of Llama-2-7B, random weights, in bfloat16 on the GPU."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        dtype=DTYPE,
    )
    with torch.device("cuda"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    return model


class GraphDecoding:
    """A text that is continued from a CUDA graph of one step, with a cache of fixed size."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        import transformers

        length = prompt.shape[1]
        cache = transformers.StaticCache(config=model.config, max_cache_len=length + TOKENS + 8)
        self._tokens = Decoding(model, prompt, cache).tokens.clone()
        self._position = torch.tensor([length], device=prompt.device)
        self._model, self._more = model, {cache_argument(model): cache, "use_cache": True}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._one()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._one()

    def _one(self) -> None:
        with torch.no_grad():
            logits = self._model(
                self._tokens,
                position_ids=self._position[None],
                cache_position=self._position,
                logits_to_keep=1,
                **self._more,
            ).logits
        self._tokens.copy_(logits[:, -1:].argmax(-1))
        self._position.add_(1)

    def step(self) -> None:
        """Write one token."""
        self._graph.replay()


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Return the median wall-clock seconds."""
    taken = []
    for repeat in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if repeat:
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def model_row(name: str, model: nn.Module) -> dict[str, Any]:
    """Measure one network."""
    made = torch.Generator().manual_seed(0)
    text = torch.randint(0, 32000, (1, PREFILL), generator=made).cuda()
    eager = Decoding(model, text[:, :PROMPT])
    row: dict[str, Any] = {"name": name, "gigabytes": weight_bytes(model) / 1e9}
    row["decode"] = 1 / timed(eager.step, 16)
    try:
        row["graph_decode"] = 1 / timed(GraphDecoding(model, text[:, :PROMPT]).step, 16)
    except RuntimeError as error:  # something in the network cannot be captured
        row["graph_decode"], row["problem"] = float("nan"), str(error)[:300]
    row["prefill"] = PREFILL / timed(lambda: prefill(model, text), 5)
    return row


def model_rows(layers: int) -> list[dict[str, Any]]:
    """Measure the network before and after it is packed."""
    model = random_llama(layers)
    rows = [model_row("bfloat16", model)]
    begin = time.perf_counter()
    steps = [("quantize", {"scheme": "w4a16", "ignore": ["lm_head"]}), ("max_calibrate", {})]
    for step in (*steps, ("compress", {})):
        model = modewright.apply_mode(model, step)
    seconds = time.perf_counter() - begin
    gc.collect()
    torch.cuda.empty_cache()
    return [*rows, {**model_row("int4 g64, packed", model), "seconds_to_pack": seconds}]


def render(rows: list[dict[str, Any]]) -> str:
    """Return the table of layers as Markdown."""
    lines = [
        "| shape | rows | weights | backend | µs | bf16 µs | x bf16 | GB/s | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['shape']} | {r['rows']} | {r['weights']} | {r['backend']} | "
        f"{r['microseconds']:.1f} | {r['bf16_microseconds']:.1f} | {r['x_bf16']:.2f} | "
        f"{r['gigabytes']:.0f} | {r['error']:.1e} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=DEFAULT)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This needs a GPU; torch finds none here.")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    head = {"gpu": name, "torch": torch.__version__, "copy": copy_speed()}
    layers = []
    with torch.no_grad():
        for shape in options.shapes:
            for kind in options.weights:
                layers += layer_rows(shape, options.rows, kind)
    models = model_rows(options.layers) if options.layers else []
    if options.json:
        print(json.dumps({**head, "layers": layers, "models": models}, indent=1))
        return
    print(f"{name}, torch {head['torch']}, copy {head['copy']:.0f} GB/s\n\n{render(layers)}\n")
    for row in models:
        print(
            f"{row['name']:20} {row['gigabytes']:6.2f} GB  decode {row['decode']:6.1f} tokens/s  "
            f"from a graph {row['graph_decode']:6.1f}  prefill {row['prefill']:8.0f} "
            f"{row.get('problem', '')} {row.get('seconds_to_pack', '')}"
        )


if __name__ == "__main__":
    main()
