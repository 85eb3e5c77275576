# SPDX-License-Identifier: Apache-2.0
"""What a folder with a Hugging Face model must be like, so that loading it can run no code."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

from modewright.errors import CheckpointError, DataError

CONFIG_FILE = "config.json"
ORIGINAL_CONFIG_FILE = "original_config.json"  # of a model that was pruned: what it was before
_ASSETS = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # what is read besides weights
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def transformers_package() -> Any:
    """Import transformers.

    Raises:
        DataError: It is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise DataError(
            "Language models need the package transformers, which is not installed. Run: "
            "pip install 'modewright[hf]'"
        ) from error


def checked_config(folder: Path, file: str = CONFIG_FILE) -> dict[str, Any]:
    """Return a folder's config if transformers can build its model without foreign code."""
    path = folder / file
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{str(folder)!r} has no {file}: expected a folder as save_pretrained writes it."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} is not readable JSON: {error}.") from error
    if not isinstance(config, dict):
        raise DataError(f"{str(path)!r}: expected an object, got {type(config).__name__}.")
    kind = config.get("model_type")
    if kind not in transformers_package().CONFIG_MAPPING:
        why = (
            "needs code that comes with the model (auto_map), which is never run"
            if "auto_map" in config
            else "is not one that this version of transformers knows"
        )
        raise DataError(f"The architecture {kind!r} in {str(path)!r} {why}.")
    return config


def checked_files(folder: Path) -> list[Path]:
    """Return the files that loading a folder reads, or say why it cannot be loaded."""
    config = checked_config(folder)
    if config.get("quantization_config") is not None:
        raise DataError(
            f"The weights in {str(folder)!r} are already quantized (quantization_config in its "
            "config.json). Expected the original floating-point weights."
        )
    if (folder / "adapter_config.json").exists():
        raise DataError(
            f"{str(folder)!r} holds an adapter, not a whole model. Merge it into its base model "
            "(merge_and_unload() of peft) and save that."
        )
    assets = [p for p in folder.iterdir() if p.suffix in _ASSETS and p.is_file()]
    return sorted([*assets, *_weight_files(folder)])


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{str(index)!r} is damaged: {error!r}.") from error
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise CheckpointError(
                f"{str(folder)!r} is incomplete: {index.name} names {missing}, which are missing."
            )
        return [folder / name for name in names]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise DataError(
            f"{str(folder)!r} has weights only as {pickles}. These are pickle files, and reading "
            "one can run any code, so only safetensors are read. If you trust the origin, convert: "
            "load the model with AutoModelForCausalLM.from_pretrained(folder) of transformers and "
            "save it with save_pretrained(new_folder)."
        )
    raise DataError(f"{str(folder)!r} has no model.safetensors (nor an index of several).")


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(files: list[Path]) -> str:
    """Return a hash over the names, sizes and contents of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()
