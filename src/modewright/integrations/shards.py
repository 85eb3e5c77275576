# SPDX-License-Identifier: Apache-2.0
"""``Shards``: the weights of a Hugging Face folder, read tensor by tensor.

Nothing is kept: a file is opened for the tensors that are asked for, each is copied, and the file
is closed, so that no mapped page stays in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modewright.errors import CheckpointError
from modewright.integrations.model_folder import checked_files

_SUFFIX = ".safetensors"
_READ_ERRORS = (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError)
_HEADER_LENGTH = 8  # bytes at the start of a safetensors file that say how long its header is


class Shards:
    """The tensors in the safetensors files of a folder, by name.

    Args:
        folder: A folder as ``save_pretrained`` writes it.

    Attributes:
        bytes: Size of all files with weights.
        values: How many numbers the weights are.

    Raises:
        DataError: The folder holds no model that can be loaded without running foreign code.
        CheckpointError: A file is damaged or missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checked = checked_files(folder)
        files = [file for file in self._checked if file.suffix == _SUFFIX]
        self.bytes = sum(file.stat().st_size for file in files)
        self._files: dict[str, Path] = {}
        self.values = 0
        for file in files:
            with _Reader(file) as reader:
                for name in reader.keys():  # noqa: SIM118 - a reader is no mapping
                    self._files[name] = file
                    self.values += math.prod(reader.get_slice(name).get_shape())

    def digest(self) -> str:
        """Return a digest over names, sizes and times of all files, and their headers.

        Weights are not read: files that were changed in place, with their times put back, are not
        noticed.
        """
        digest = hashlib.sha256()
        for file in self._checked:
            found = file.stat()
            digest.update(f"{file.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
            digest.update(_header(file) if file.suffix == _SUFFIX else file.read_bytes())
        return digest.hexdigest()

    def check(self, wanted: Mapping[str, tuple[tuple[str, ...], torch.Size]]) -> None:
        """Check that all tensors of a model are there; no weight is read.

        Args:
            wanted: For every tensor its name, the names under which it may be stored, and its
                shape.

        Raises:
            CheckpointError: One is missing, or has another shape.
        """
        problems = []
        by_file: dict[Path, list[tuple[str, torch.Size]]] = {}
        for name, (names, shape) in wanted.items():
            stored = self._stored(names)
            if stored is None:
                problems.append(f"  {name}: missing")
            else:
                by_file.setdefault(self._files[stored], []).append((stored, shape))
        for file, tensors in by_file.items():
            with _Reader(file) as reader:
                for name, shape in tensors:
                    found = tuple(reader.get_slice(name).get_shape())
                    if found != tuple(shape):
                        problems.append(f"  {name}: {found}, expected {tuple(shape)}")
        if problems:
            more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise CheckpointError(
                f"The weights in {str(self._folder)!r} are not, name by name, those of the model "
                "that its config.json describes:\n" + "\n".join(problems[:8]) + f"{more}\n"
                "Files of an architecture whose weights transformers renames or fuses when it "
                "loads them cannot be streamed: load the model with from_pretrained and save it, "
                "or optimize without streaming."
            )

    def read(
        self, wanted: Iterable[tuple[str, tuple[str, ...], torch.dtype]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Read tensors, each into memory of its own.

        Args:
            wanted: Name of a tensor, the names under which it may be stored, and the dtype to read
                floating-point values as.

        Yields:
            The name and the tensor, on the CPU.

        Raises:
            CheckpointError: A file is damaged, or lacks one of them.
        """
        by_file: dict[Path, list[tuple[str, str, torch.dtype]]] = {}
        for name, names, dtype in wanted:
            stored = self._stored(names)
            if stored is None:
                raise CheckpointError(f"{str(self._folder)!r} lacks the tensor {name!r}.")
            by_file.setdefault(self._files[stored], []).append((name, stored, dtype))
        for file, tensors in by_file.items():
            with _Reader(file) as reader:
                for name, stored, dtype in tensors:
                    yield name, _copied(reader.get_tensor(stored), dtype)

    def _stored(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if name in self._files), None)


def _copied(mapped: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy that refers to no file; whole numbers keep their dtype."""
    dtype = dtype if mapped.is_floating_point() else mapped.dtype
    return mapped.to(dtype, copy=True)


def _header(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_HEADER_LENGTH), "little")
        return stream.read(min(length, file.stat().st_size))


class _Reader:
    """Opens a safetensors file; whatever goes wrong inside is a :class:`CheckpointError`."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> Any:
        try:
            self._reader: Any = safe_open(str(self._file), framework="pt", device="cpu")
            return self._reader.__enter__()  # type: ignore[no-untyped-call,unused-ignore]
        except _READ_ERRORS as error:
            raise CheckpointError(
                f"{str(self._file)!r} is not a readable safetensors file: {error}. Copy it anew "
                "from its source."
            ) from error

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self._reader.__exit__(kind, error, trace)
        if isinstance(error, (SafetensorError, OSError)):
            raise CheckpointError(f"{str(self._file)!r} cannot be read: {error}") from error
