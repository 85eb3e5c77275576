# SPDX-License-Identifier: Apache-2.0
"""The hidden states between two blocks, one chain of them for every run of data.

A pass may run the data several times (in the original network and in the converted one; to weigh
inputs and then to see ranges), and each pass of a recipe finds the network as the passes before it
left it. Each such run is a chain of its own, so that a block gets, in every run of every pass, what
it would get in the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from modewright.calibration.calls import Call
from modewright.modes.manifest import tensor_digest
from modewright.modes.storage import replace_file
from modewright.run.streaming.front import Frames


class Chains:
    """All chains of a run, on their way from block to block.

    Args:
        folder: Where the hidden states that go into a block are kept until it is finished.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._frames: dict[str, Frames] = {}
        self._hidden: dict[str, list[torch.Tensor]] = {}
        self._next: dict[str, list[torch.Tensor]] = {}

    def calls(self, key: str, block: str, first: Callable[[], Frames]) -> list[Call]:
        """Return how a block is called in one chain.

        Args:
            key: The chain.
            block: The block.
            first: Runs what comes before the blocks; called once for a chain, and again when a run
                goes on.
        """
        if key not in self._frames:
            self._frames[key] = first()
        calls = self._frames[key][block]
        if key not in self._hidden:  # of the first block, whose calls hold their hidden states
            return calls
        pairs = zip(calls, self._hidden[key], strict=True)
        return [call.with_hidden(hidden) for call, hidden in pairs]

    def sample(self, key: str, block: str, first: Callable[[], Frames]) -> Call:
        """Return the first call of a block in one chain.

        Args:
            key: The chain.
            block: The block.
            first: Runs the first batch through what comes before the blocks.
        """
        frames = self._frames[key] if key in self._frames else first()
        hidden = self._hidden.get(key)
        return frames[block][0] if hidden is None else frames[block][0].with_hidden(hidden[0])

    def hidden(self, key: str) -> list[torch.Tensor]:
        """Return the hidden states that reached the place where a run is."""
        return self._hidden[key]

    def keep(self, key: str, outputs: Sequence[torch.Tensor]) -> None:
        """Keep what the block puts out in one chain."""
        self._next[key] = list(outputs)

    def advance(self, finished: int, block: str) -> None:
        """Go on to the next block; what goes into it is on disk then.

        Args:
            finished: How many blocks are finished.
            block: The last of them.
        """
        for frames in self._frames.values():
            del frames[block]
        self._hidden, self._next = self._next, {}
        tensors = {
            f"{key}/{number}": tensor.contiguous()
            for key, states in self._hidden.items()
            for number, tensor in enumerate(states)
        }
        header = {"digest": _digest(tensors)}
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._path(finished), lambda file: save_file(tensors, file, metadata=header))

    def forget(self, finished: int) -> None:
        """Delete what went into a block that is finished and written."""
        self._path(finished).unlink(missing_ok=True)

    def load(self, finished: int) -> bool:
        """Read what goes into the next block; whether it is there and whole.

        Args:
            finished: How many blocks are finished.
        """
        try:
            with safe_open(self._path(finished), "pt") as file:
                digest = (file.metadata() or {}).get("digest")
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return False
        if digest != _digest(tensors):
            return False
        for name in sorted(tensors, key=_order):
            self._hidden.setdefault(name.rpartition("/")[0], []).append(tensors[name])
        return True

    def _path(self, finished: int) -> Path:
        return self._folder / f"after-{finished:05}.safetensors"


def _order(name: str) -> tuple[str, int]:
    key, _, number = name.rpartition("/")
    return key, int(number)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensor_digest(tensors[name])};".encode())
    return digest.hexdigest()
