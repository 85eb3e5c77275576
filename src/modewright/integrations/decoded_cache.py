# SPDX-License-Identifier: Apache-2.0
"""The cache of decoded models: folders named by the content of the file they were made from.

An entry is made in a temporary folder beside its place and renamed, so an interrupted run leaves
nothing half-written and two processes may race. ``MODEWRIGHT_CACHE`` moves the cache.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from modewright.errors import DataError
from modewright.integrations.model_folder import sha256_of

_MANIFEST = "decoded.json"
_LAYOUT = 1  # of a cache entry; entries of another layout are rebuilt


def entry_for(digest: str) -> Path:
    """Return the folder of the entry for a file with this SHA-256."""
    return _cache_root() / "models" / digest[:16]


def discard(entry: Path) -> None:
    """Mark an entry as damaged, so that it is made anew."""
    (entry / _MANIFEST).unlink(missing_ok=True)


def fill(entry: Path, digest: str, decode: Callable[[Path], None], *, what: str) -> None:
    """Make an entry.

    Args:
        entry: Its folder.
        digest: The SHA-256 of the file it is made from.
        decode: Writes the decoded files into the folder it is given.
        what: Name of that file, for messages.

    Raises:
        DataError: The cache cannot be written to.
    """
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=entry.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            decode(new)
            files = {file.name: _facts(file) for file in new.iterdir()}
            manifest = {"layout": _LAYOUT, "gguf_sha256": digest, "files": files}
            (new / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _publish(new, entry, digest)
    except OSError as error:
        raise DataError(
            f"Cannot keep the decoded copy of {what!r} in {str(entry.parent)!r}: {error}. "
            "Free some space there, or name another folder in MODEWRIGHT_CACHE."
        ) from error


def _cache_root() -> Path:
    named = os.environ.get("MODEWRIGHT_CACHE")
    if named:
        return Path(named).expanduser()
    platformdirs = importlib.import_module("platformdirs")
    return Path(platformdirs.user_cache_path("modewright"))


def _facts(file: Path) -> dict[str, Any]:
    """Return what a cache entry must still have: the size, and the hash where that is quick."""
    size = file.stat().st_size
    return {"bytes": size, "sha256": sha256_of(file) if file.suffix != ".safetensors" else None}


def is_whole(entry: Path, digest: str) -> bool:
    """Tell whether a cache entry was made from this GGUF file and has all of its files."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        made_for = (manifest["layout"], manifest["gguf_sha256"])
        files = dict(manifest["files"])
        return made_for == (_LAYOUT, digest) and all(
            _facts(entry / name) == facts for name, facts in files.items()
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _publish(new: Path, entry: Path, digest: str) -> None:
    """Rename a finished folder to its place, unless another process already put one there."""
    for attempt in range(5):
        try:
            new.rename(entry)
            return
        except OSError:
            if is_whole(entry, digest):
                return
            if attempt == 4:
                raise
        with suppress(FileNotFoundError):  # another process may have moved it
            entry.rename(new.with_name(f"damaged-{attempt}"))  # removed with the temporary folder
