# SPDX-License-Identifier: Apache-2.0
"""Taking checkpoints apart and putting them together wrongly, with digests that are right."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from modewright.modes.storage import HEADER_KEY, MANIFEST_NAME

Tensors = dict[str, Any]
Edit = Callable[[dict[str, Any], Tensors], dict[str, Any] | None]


def sealed(body: dict[str, Any]) -> str:
    """The text of a manifest with the digest that its body has."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({**body, "sha256": digest})


def read_body(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as it lies there."""
    if path.is_dir():
        return json.loads((path / MANIFEST_NAME).read_text())
    with safe_open(str(path), "pt") as reader:
        return json.loads(reader.metadata()[HEADER_KEY])


def tensor_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def read_tensors(path: Path) -> Tensors:
    with safe_open(str(path), "pt") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest in place; an edit may return another text to write as it is."""
    body = read_body(path)
    edited = edit(body)
    write_manifest(path, edited if isinstance(edited, str) else sealed(body))


def write_manifest(path: Path, text: str) -> None:
    if path.is_dir():
        (path / MANIFEST_NAME).write_text(text)
    else:
        save_file(read_tensors(path), path, metadata={HEADER_KEY: text, "format": "pt"})


def edit_tensors(path: Path, edit: Callable[[Tensors], Any]) -> None:
    """Change the stored tensors of the first file that has weights, not the manifest."""
    file = next(f for f in tensor_files(path) if not f.name.startswith("modes-"))
    with safe_open(str(file), "pt") as reader:
        metadata = reader.metadata()
    tensors = read_tensors(file)
    edit(tensors)
    save_file(tensors, file, metadata=metadata)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the safetensors header of the first file that has weights."""
    file = next(f for f in tensor_files(path) if not f.name.startswith("modes-"))
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(edit(header) or header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
