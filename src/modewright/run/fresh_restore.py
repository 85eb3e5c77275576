# SPDX-License-Identifier: Apache-2.0
"""Proves a checkpoint: another process builds the model from the folder alone and runs it.

The process knows nothing of the one that optimized: it reads ``config.json``, restores modes and
weights, runs the probe and writes the logits, which are then compared bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modewright.errors import CheckpointError


def device_of(model: nn.Module) -> torch.device:
    """Return where a model is; packed ones may have no parameters."""
    return next(chain(model.parameters(), model.buffers()), torch.empty(0)).device


def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of one window of tokens, ``[1, length, vocabulary]``."""
    with torch.no_grad():
        output = model(tokens.to(device_of(model)))
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits.detach().cpu().contiguous()


def fresh_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits that a fresh process gets from the model in ``folder``.

    Args:
        folder: What a run saved.
        tokens: int64 ``[1, length]``.

    Raises:
        CheckpointError: That process failed; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as exchange:
        probe, answer = Path(exchange) / "probe.safetensors", Path(exchange) / "logits.safetensors"
        save_file({"tokens": tokens.contiguous()}, probe)
        command = [sys.executable, "-m", __name__, str(folder), str(probe), str(answer)]
        command.append(str(torch.get_num_threads()))
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
        logits: torch.Tensor = load_file(answer)["logits"]
        return logits.clone()


def main(folder: str, probe: str, answer: str, threads: str) -> None:
    """Restore, run, write: what the fresh process does."""
    from modewright.api import restore
    from modewright.integrations.transformers import build_from_config

    torch.set_num_threads(int(threads))
    model = restore(build_from_config(Path(folder)), folder).eval()
    save_file({"logits": logits_of(model, load_file(probe)["tokens"])}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
