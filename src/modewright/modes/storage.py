# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint lies on disk: one safetensors file, or a folder of them.

A file is written under a temporary name, flushed to disk and renamed. In a folder, every save
writes files with names of their own and then replaces ``mode_state.json``, which names them: until
that one rename the folder holds the old checkpoint, afterwards the new one. Nothing that is read
here can run code: safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from modewright.errors import CheckpointError
from modewright.modes.codec import dumps
from modewright.modes.manifest import METADATA_PREFIX, Manifest, TensorEntry
from modewright.modes.tensor_memory import read_into_memory

HEADER_KEY = "modewright"
MANIFEST_NAME = "mode_state.json"
INDEX_NAME = "model.safetensors.index.json"
SUFFIX = ".safetensors"
# Names that promise another format: no folder is made under them by mistake.
FOREIGN_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".gguf", ".onnx", ".json")
MAX_MANIFEST_BYTES = 256 * 2**20
MAX_SHARD_BYTES = 5 * 2**30

Tensors = dict[str, torch.Tensor]
# What the safetensors reader and torch raise on a file that is not what it says.
READ_ERRORS = (
    SafetensorError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    OverflowError,
)


def require_checkpoint_name(path: Path) -> None:
    """Check that ``path`` can be the name of a checkpoint that is to be written.

    Raises:
        CheckpointError: It ends like a file of another format, or is a file where a folder must be.
    """
    if path.suffix.lower() in FOREIGN_SUFFIXES or (not is_single_file(path) and path.is_file()):
        raise CheckpointError(
            f"{path} cannot be written: a checkpoint is a file whose name ends in {SUFFIX}, or a "
            "folder."
        )


def is_single_file(path: Path) -> bool:
    """Whether ``path`` names a file rather than a folder."""
    return path.suffix == SUFFIX


def write_checkpoint(path: Path, manifest: Manifest, tensors: Tensors, *, plain: bool) -> None:
    """Write a checkpoint; an interruption at any point leaves the old one whole.

    Args:
        path: A name that ends in ``.safetensors``, or a folder (made if it is missing).
        manifest: What to write about the tensors; their ``file`` is filled in here.
        tensors: The tensors of the manifest, by name.
        plain: The weights alone are the model, so other programs may read them: the files get the
            names that Hugging Face libraries look for.

    Raises:
        CheckpointError: The path cannot be written to.
    """
    require_checkpoint_name(path)
    try:
        if is_single_file(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = {HEADER_KEY: manifest.dumps(), "format": "pt"}
            replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=text))
        else:
            path.mkdir(parents=True, exist_ok=True)
            _write_folder(path, manifest, tensors, plain)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {path} could not be written: {error}") from error


def _lies_in_one_file(path: Path) -> bool:
    try:
        return is_single_file(path) and not path.is_dir()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _write_folder(folder: Path, manifest: Manifest, tensors: Tensors, plain: bool) -> None:
    old = _files_of_old_manifest(folder)
    stem = "model" if plain else "modewright"
    placed = _placed(manifest, tensors, stem)
    files = sorted({entry.file for entry in placed.tensors.values()})
    for file in files:
        shard = {n: tensors[n] for n, entry in placed.tensors.items() if entry.file == file}
        write_shard(folder / file, shard)
    replace_text(folder / MANIFEST_NAME, placed.dumps())
    if plain:
        write_index(folder, placed, sum(tensors[n].nbytes for n in _weights(placed)))
    else:
        (folder / INDEX_NAME).unlink(missing_ok=True)
    for file in old - set(files):
        (folder / file).unlink(missing_ok=True)


def write_index(folder: Path, manifest: Manifest, total_size: int) -> None:
    """Write where every weight lies, as Hugging Face libraries look it up.

    Args:
        folder: The folder.
        manifest: Its manifest, with the file of every tensor.
        total_size: Bytes of all weights.
    """
    index = {
        "metadata": {"total_size": total_size},
        "weight_map": {name: manifest.tensors[name].file for name in _weights(manifest)},
    }
    replace_text(folder / INDEX_NAME, dumps(index))


def _weights(manifest: Manifest) -> list[str]:
    """Return the names of stored tensors that are the model's own."""
    return [name for name in manifest.tensors if not name.startswith(METADATA_PREFIX)]


def write_shard(path: Path, tensors: Tensors) -> None:
    """Write some tensors to one file, in one step."""
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def _placed(manifest: Manifest, tensors: Tensors, stem: str) -> Manifest:
    """Return the manifest with a file for every tensor, in shards of bounded size."""
    shards: list[list[str]] = []
    size = MAX_SHARD_BYTES + 1
    for name in _weights(manifest):
        size += tensors[name].nbytes
        if size > MAX_SHARD_BYTES:
            shards.append([])
            size = tensors[name].nbytes
        shards[-1].append(name)
    names = [f"{i:05}-of-{len(shards):05}" for i in range(1, len(shards) + 1)]
    extra = [n for n in manifest.tensors if n.startswith(METADATA_PREFIX)]
    groups = [*zip([f"{stem}-{n}" for n in names], shards, strict=True)]
    if extra:
        groups.append(("modes", extra))
    files: dict[str, str] = {}
    for prefix, members in groups:
        content = "".join(manifest.tensors[n].sha256 + n for n in members)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        files.update(dict.fromkeys(members, f"{prefix}-{digest}{SUFFIX}"))
    return Manifest(
        state=manifest.state,
        tensors={
            n: TensorEntry(e.dtype, e.shape, e.sha256, files[n])
            for n, e in manifest.tensors.items()
        },
        aliases=manifest.aliases,
    )


def _files_of_old_manifest(folder: Path) -> set[str]:
    """Return the files that a checkpoint about to be replaced consists of."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return set()  # nothing there, or nothing that is ours to delete
    return {entry.file for entry in manifest.tensors.values()}


def read_manifest(path: Path) -> Manifest:
    """Read what a checkpoint says of itself; no tensor is read.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    where = str(path)
    if _lies_in_one_file(path):
        with _opened(path) as reader:
            text = (reader.metadata() or {}).get(HEADER_KEY)
        if text is None:
            raise CheckpointError(
                f"{where} is a safetensors file without a mode state: it was not written by "
                "modewright.save. Load it with the library that wrote it."
            )
        manifest = Manifest.loads(text, where)
        _check_files(manifest, where, lambda file: file == "")
        return manifest
    file = path / MANIFEST_NAME
    try:
        if not file.is_file():
            what = "is a file of another kind" if path.is_file() else f"holds no {MANIFEST_NAME}"
            what = what if path.exists() else "does not exist"
            raise CheckpointError(
                f"{where} {what}: expected a .safetensors file or a folder that modewright.save "
                "wrote."
            )
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{file} is larger than {MAX_MANIFEST_BYTES >> 20} MiB.")
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    manifest = Manifest.loads(content, where)
    _check_files(manifest, where, lambda file: Path(file).name == file and file.endswith(SUFFIX))
    return manifest


def _check_files(manifest: Manifest, where: str, allowed: Callable[[str], bool]) -> None:
    """Refuse a manifest that would have a file read which is not part of the checkpoint."""
    for name, entry in manifest.tensors.items():
        if not allowed(entry.file):
            raise CheckpointError(
                f"{where} places the tensor {name!r} in {entry.file!r}, which is not the name of a "
                "file of that checkpoint."
            )


def read_tensors(path: Path, manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Read every stored tensor, one after the other, into memory of its own, aligned.

    Raises:
        CheckpointError: A tensor is missing, there is one too many, or one is not as described.
    """
    files: dict[str, list[str]] = {}
    for name, entry in manifest.tensors.items():
        files.setdefault(entry.file, []).append(name)
    if _lies_in_one_file(path):
        files.setdefault("", [])
    for file, names in files.items():
        source = path / file if file else path
        with _opened(source) as reader:
            stored = set(reader.keys())
            _check_names(source, stored, set(names))
            for name in names:
                entry = manifest.tensors[name]
                shape = tuple(reader.get_slice(name).get_shape())
                if shape != entry.shape:
                    raise CheckpointError(
                        f"The tensor {name!r} in {source} has shape {shape}, but the manifest "
                        f"says {entry.shape}: the file is damaged."
                    )
            yield from read_into_memory(source, reader, names)


def _check_names(source: Path, stored: set[str], expected: set[str]) -> None:
    if stored == expected:
        return
    missing, extra = sorted(expected - stored), sorted(stored - expected)
    problems = [f"lacks {missing[:5]}"] * bool(missing) + [f"has {extra[:5]} too much"] * bool(
        extra
    )
    raise CheckpointError(
        f"{source} is not what its manifest describes: it {' and '.join(problems)}."
    )


class _opened(contextlib.AbstractContextManager[Any]):  # noqa: N801
    """Open a safetensors file; whatever goes wrong inside is a :class:`CheckpointError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        try:
            if not self._path.is_file():
                raise CheckpointError(f"{self._path} does not exist or is not a file.")
            self._reader: Any = safe_open(str(self._path), framework="pt", device="cpu")
            return self._reader.__enter__()  # type: ignore[no-untyped-call,unused-ignore]
        except CheckpointError:
            raise
        except READ_ERRORS as error:
            raise CheckpointError(
                f"{self._path} is not a readable safetensors file: {error}"
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        self._reader.__exit__(kind, error, trace)
        if isinstance(error, READ_ERRORS) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self._path} cannot be read: {error}") from error


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step: the old content or the new one is there, never a part."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, flush it to disk, and rename it to ``path``."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; writers may choose 0600
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be flushed, and need not be
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
