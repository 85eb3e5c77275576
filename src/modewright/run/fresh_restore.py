# SPDX-License-Identifier: Apache-2.0
"""Proves a checkpoint: another process builds the model from the folder alone and runs it.

The process knows nothing of the one that optimized: it reads ``config.json``, restores modes and
weights, runs the probe and writes what comes out, which is then compared bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modewright.errors import CheckpointError
from modewright.evaluation.outputs import main_output
from modewright.run.device import device_of


def output_of(model: nn.Module, probe: torch.Tensor) -> torch.Tensor:
    """Return what comes out for one input: logits, the last hidden state, or the only tensor."""
    with torch.no_grad():
        found, _ = main_output(model(probe.to(device_of(model))), "the proof of a checkpoint")
    return found.detach().cpu().contiguous()


def fresh_output(folder: Path, probe: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return what a fresh process gets from the model in ``folder``.

    Args:
        folder: What a run saved.
        probe: One input, ``[1, ...]``.
        device: Where it is run.

    Raises:
        CheckpointError: That process failed; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as exchange:
        question, answer = Path(exchange) / "in.safetensors", Path(exchange) / "out.safetensors"
        save_file({"probe": probe.cpu().contiguous()}, question)
        command = [sys.executable, "-m", __name__, str(folder), str(question), str(answer)]
        command += [str(torch.get_num_threads()), str(device)]
        paths = os.pathsep.join(path for path in sys.path if path)  # finds what this one finds
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": paths},
        )
        if done.returncode != 0 or not answer.is_file():
            words = (done.stderr or done.stdout).strip().splitlines()[-8:]
            raise CheckpointError(
                f"A fresh process could not restore {folder} (exit code {done.returncode}):\n"
                + "\n".join(words)
            )
        found: torch.Tensor = load_file(answer)["output"]
        return found.clone()


def main(folder: str, question: str, answer: str, threads: str, device: str) -> None:
    """Restore, run, write: what the fresh process does."""
    from modewright.api import restore
    from modewright.integrations.transformers import build_from_config

    torch.set_num_threads(int(threads))
    model = restore(build_from_config(Path(folder)), folder).eval().to(device)
    save_file({"output": output_of(model, load_file(question)["probe"])}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
