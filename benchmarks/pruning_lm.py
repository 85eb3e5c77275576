# SPDX-License-Identifier: Apache-2.0
"""What pruning a language model costs in loss, before any recovery, and how much faster it is.

    python benchmarks/workspace.py WORKSPACE
    python benchmarks/pruning_lm.py WORKSPACE --results FOLDER [--only PATTERN] [--windows 20]
    python benchmarks/pruning_lm.py WORKSPACE --results FOLDER --table

prunes the demo model to 90 % and 75 % of its parameters by every method of :data:`METHODS` and
writes one JSON file for each row; a row whose file is there is not run again. What modewright's
searches measured is kept in the results folder, so that the second size takes little. With
``--export FOLDER`` the models are written there as ``modewright optimize`` writes them.

Methods by others are written out here, from their papers: random blocks, *block influence* (Men et
al. 2024, ShortGPT), magnitude (Fang et al. 2023, torch-pruning's group norm), and mean absolute
activations (Muralidharan et al. 2024, Minitron), the last two on the width of the feed-forward
layers. They see the same calibration windows.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from measure import cpu_seconds, losses

import modewright
from modewright.calibration.forward import run_batch
from modewright.calibration.self_text import generate_windows
from modewright.integrations.transformers import load_tokenizer, save_assets
from modewright.pruning.depth.export import drop_blocks
from modewright.pruning.graph import trace_dimensions
from modewright.pruning.importance.magnitude import magnitudes
from modewright.pruning.surgery import keep

SIZES = (0.9, 0.75)
SELF_WINDOWS = {"count": 48, "length": 256, "seed": 0}
SCORED = 4  # windows on which searches measure effects


@dataclass
class Task:
    """One row: the model, the data, the size to reach."""

    workspace: Path
    results: Path
    share: float
    model: nn.Module
    calibration: list[dict[str, torch.Tensor]]

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.model.model.layers

    @property
    def params(self) -> int:
        """Parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    def drop_in_order(self, order: list[int]) -> None:
        """Drop blocks in an order until the model is small enough."""
        block = sum(p.numel() for p in self.layers[0].parameters())
        count = math.ceil((1 - self.share) * self.params / block)
        drop_blocks(self.model, [f"model.layers.{i}" for i in sorted(order[:count])])

    def cut_feed_forward(self, score: Callable[[Any], torch.Tensor]) -> None:
        """Keep the feed-forward units with the best scores, as many in every block."""
        graph = trace_dimensions(self.model, {"input_ids": torch.arange(16)[None]})
        groups = [group for group in graph.groups if group.kind == "ffn"]
        unit = sum(p.numel() for p in self.layers[0].mlp.parameters()) // groups[0].size
        gone = math.ceil((1 - self.share) * self.params / (unit * len(groups)))
        kept = {
            group.name: sorted(score(group).topk(group.size - gone).indices.tolist())
            for group in groups
        }
        keep(self.model, groups, kept)


def random_blocks(task: Task) -> None:
    """Drop blocks at random."""
    generator = torch.Generator().manual_seed(0)
    task.drop_in_order(torch.randperm(len(task.layers), generator=generator).tolist())


def block_influence(task: Task) -> None:
    """Drop the blocks whose output is most like their input."""
    similar = torch.zeros(len(task.layers))

    def compare(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            similar[place] += torch.cosine_similarity(args[0], after, dim=-1).mean()

        return hook

    handles = [b.register_forward_hook(compare(i)) for i, b in enumerate(task.layers)]
    with torch.no_grad():
        for batch in task.calibration[:16]:
            run_batch(task.model, batch)
    for handle in handles:
        handle.remove()
    task.drop_in_order(similar.argsort(descending=True).tolist())


def magnitude(task: Task) -> None:
    """Keep feed-forward units with large weights."""
    task.cut_feed_forward(lambda group: magnitudes(task.model, group))


def mean_activation(task: Task) -> None:
    """Keep feed-forward units with large mean absolute activations."""
    means: dict[str, torch.Tensor] = {}

    def gather(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            means[path] = means.get(path, 0) + args[0].abs().mean((0, 1))

        return hook

    named = {f"{n}.mlp.down_proj": m.mlp.down_proj for n, m in _blocks(task.model)}
    handles = [m.register_forward_pre_hook(gather(path)) for path, m in named.items()]
    with torch.no_grad():
        for batch in task.calibration[:16]:
            run_batch(task.model, batch)
    for handle in handles:
        handle.remove()
    task.cut_feed_forward(lambda group: means[group.consumers[0].module])


def depth(task: Task) -> None:
    """Modewright's mode ``depth``."""
    _search(task, "depth", [])


def minitron(task: Task) -> None:
    """Modewright's mode ``minitron``."""
    _search(task, "minitron", [])


def minitron_refit(task: Task) -> None:
    """Modewright's modes ``minitron`` and ``refit``."""
    _search(task, "minitron", ["refit"])


METHODS: dict[str, Callable[[Task], None]] = {
    "random blocks": random_blocks,
    "block influence": block_influence,
    "depth": depth,
    "magnitude": magnitude,
    "mean activation": mean_activation,
    "minitron": minitron,
    "minitron, refit": minitron_refit,
}


def _blocks(model: Any) -> list[tuple[str, Any]]:
    return [(f"model.layers.{i}", block) for i, block in enumerate(model.model.layers)]


def _search(task: Task, mode: str, after: list[str]) -> None:
    result = modewright.search(
        task.model,
        mode,
        {"params": f"{100 * task.share:g}%"},
        calibration=task.calibration,
        config={"batches": SCORED},
        checkpoint=task.results / f"{mode}.search.safetensors",
    )
    print({k: v for k, v in result.best.items() if k != "kept"}, flush=True)
    for step in after:
        modewright.apply_mode(task.model, step, mode_kwargs={"calibration": task.calibration})
    modewright.apply_mode(task.model, "export_prune")


def tensor(workspace: Path, name: str) -> torch.Tensor:
    """Read windows of token ids."""
    with safe_open(workspace / "windows.safetensors", "pt") as file:
        return file.get_tensor(name)


def calibration(workspace: Path, model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Return text that the model wrote itself; it is written once."""
    path = workspace / "self-text.safetensors"
    if not path.exists():
        save_file({"windows": generate_windows(model, **SELF_WINDOWS)}, path)
    return [{"input_ids": row} for row in load_file(path)["windows"].split(1)]


def run(options: argparse.Namespace, name: str, share: float) -> dict[str, Any]:
    """Prune and measure."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.workspace / "model", dtype=torch.float32
    ).eval()
    data = calibration(options.workspace, model)
    task = Task(options.workspace, options.results, share, model, data)
    before, started = task.params, cpu_seconds()
    if name != "original":
        METHODS[name](task)
    spent = cpu_seconds() - started
    row: dict[str, Any] = {"method": name, "share": share, "params": task.params / before}
    row["cpu_seconds"] = spent
    row["loss"] = {}
    for text in ("addresses", "novel"):
        windows = tensor(options.workspace, f"evaluation.{text}")[: options.windows]
        found = losses(model, windows)
        row["loss"][text] = sum(found) / len(found)
    row["windows"] = options.windows
    if options.export:
        folder = options.export / f"{name.replace(', ', '-').replace(' ', '_')}-{share}"
        modewright.save(model, folder)
        save_assets(model, load_tokenizer(options.workspace / "model"), folder)
    return row


def table(folder: Path) -> str:
    """Return all results of a folder as a table in Markdown."""
    rows = [json.loads(file.read_text()) for file in folder.glob("pruning-*.json")]
    original = next(row["loss"] for row in rows if row["method"] == "original")
    lines = ["| parameters | method | loss increase | CPU s |", "|---|---|---|---|"]
    rows = [row for row in rows if row["method"] != "original"]
    for row in sorted(rows, key=lambda r: (-r["share"], -sum(r["loss"].values()))):
        more = " / ".join(f"{row['loss'][text] - original[text]:.3f}" for text in original)
        lines.append(
            f"| {100 * row['params']:.1f} % | {row['method']} | {more} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", default="*", help="a pattern of methods")
    parser.add_argument("--windows", type=int, default=20, help="of each evaluation text")
    parser.add_argument("--export", type=Path, help="write the models there")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    rows = [("original", 1.0), *((name, share) for share in SIZES for name in METHODS)]
    for name, share in () if options.table else rows:
        path = options.results / f"pruning-{name.replace(', ', '-').replace(' ', '_')}-{share}.json"
        if path.exists() or not (name == "original" or fnmatch.fnmatch(name, options.only)):
            continue
        path.write_text(json.dumps(run(options, name, share), indent=1) + "\n")
        print(path.read_text(), flush=True)
    print(table(options.results))


if __name__ == "__main__":
    main()
