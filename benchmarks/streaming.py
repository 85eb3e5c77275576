# SPDX-License-Identifier: Apache-2.0
"""What it takes to optimize a model that is larger than memory: peak memory, seconds for a block.

    python benchmarks/streaming.py WORKSPACE [--layers 4 8] [--hidden 4096] [--recipe int4-packed]

For each depth a Llama of the width of a 7-billion-parameter model (hidden 4096, intermediate 11008,
32 heads, vocabulary 32000), or of another one in the same proportions, with random bfloat16 weights
is written to WORKSPACE, shard by shard; 32 layers are the whole of it, 13.5 GB. ``modewright
optimize --stream`` then runs in a child process: without ``--recipe`` one that needs no data (int4
weights in groups of 64 and int8 embedding and head, packed), otherwise the one that is named, with
its calibration data. The peak is what the system
says of the child (``ru_maxrss``, which counts pages of mapped files too); seconds are those of the
processor and of the wall clock. Everything is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEAD_SIZE, VOCABULARY = 4096, 11008, 128, 32000
RECIPE = """\
steps:
  - mode: quantize
    config:
      scheme: w4a16
      rules:
        - targets: [Embedding, lm_head]
          scheme: w8a16
  - mode: max_calibrate
  - mode: compress
"""


def block_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one block's weights."""
    square, wide = (hidden, hidden), (hidden * INTERMEDIATE // HIDDEN, hidden)
    projections = {f"self_attn.{name}_proj": square for name in "qkvo"}
    return {
        **projections,
        "mlp.gate_proj": wide,
        "mlp.up_proj": wide,
        "mlp.down_proj": wide[::-1],
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }


def outside_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights around the blocks."""
    table = (VOCABULARY, hidden)
    return {"model.embed_tokens": table, "model.norm": (hidden,), "lm_head": table}


def write_model(folder: Path, layers: int, hidden: int) -> int:
    """Write a model with random weights, two blocks to a file; return its parameters."""
    import tokenizers
    import transformers

    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * INTERMEDIATE // HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    split = tokenizers.pre_tokenizers.ByteLevel  # every byte of a text is a token
    bytes_of = {byte: number for number, byte in enumerate(sorted(split.alphabet()))}
    inner: Any = tokenizers.Tokenizer(tokenizers.models.BPE(bytes_of, merges=[]))
    inner.pre_tokenizer = split(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)

    blocks = [
        {f"model.layers.{number}.{name}": shape for name, shape in block_shapes(hidden).items()}
        for number in range(layers)
    ]
    outside = outside_shapes(hidden)
    files = [outside, *({**a, **b} for a, b in zip(blocks[::2], blocks[1::2], strict=True))]
    places, size = {}, 0
    torch.manual_seed(0)
    for number, shapes in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {f"{name}.weight": _random(shape) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size // 2


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    made = torch.empty(shape, dtype=torch.bfloat16)
    return made.fill_(1) if len(shape) == 1 else made.normal_(std=0.02)


def measure(workspace: Path, layers: int, options: argparse.Namespace) -> dict[str, float]:
    """Write, optimize and delete a model of some depth; return what it took."""
    name = f"{options.hidden}-{layers}"
    model, output = workspace / f"llama-{name}", workspace / f"packed-{name}"
    recipe = options.recipe or str(workspace / "streamed.yaml")
    if not model.is_dir():
        write_model(model, layers, options.hidden)
    if not options.recipe:
        Path(recipe).write_text(RECIPE)
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "modewright", "optimize", str(model), "--stream", "--json"]
    command += ["--recipe", recipe, "--output", str(output)]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = "" if child.stdout is None else child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"the run failed with status {status}")
    result = json.loads(said)
    steps = {step["name"]: step["seconds"] for step in result["steps"]}
    source = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    found = {
        "layers": layers,
        "billions": source / 2 / 1e9,
        "source_gb": source / 1e9,
        "output_gb": result["size_after"] / 1e9,
        "peak_gb": used.ru_maxrss * 1024 / 1e9,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "wall_seconds": wall,
        "blocks_seconds": steps["blocks"],
        "verify_seconds": steps["restore"],
    }
    if not options.keep:
        shutil.rmtree(model)
        shutil.rmtree(output)
    return found


def main() -> None:
    """Measure each depth, and what one more block takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8], help="even numbers")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width, a multiple of 128")
    parser.add_argument("--recipe", help="name of a recipe, or a YAML file")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="do not delete models and outputs")
    options = parser.parse_args()
    options.workspace.mkdir(parents=True, exist_ok=True)
    rows = []
    for layers in options.layers:
        row = measure(options.workspace, layers, options)
        rows.append(row)
        if not options.json:
            print("  ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)
    if options.json:
        print(json.dumps(rows))
    elif len(rows) > 1:
        first, last = rows[0], rows[-1]
        more = last["layers"] - first["layers"]
        for name in ("processor_seconds", "wall_seconds"):
            print(f"one more block: {(last[name] - first[name]) / more:.2f} {name}")


if __name__ == "__main__":
    main()
