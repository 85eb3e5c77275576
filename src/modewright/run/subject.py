# SPDX-License-Identifier: Apache-2.0
"""What a run works on: a model, and what is needed to feed, rebuild and recognise it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modewright.calibration.self_text import ordinary_tokens, writes_text
from modewright.errors import ConfigError, DataError
from modewright.modes.checkpoint import restore
from modewright.modes.manifest import tensor_digest
from modewright.modes.model_like import ModelLike, as_model, unwrap
from modewright.modes.registry import ModeRegistry
from modewright.modes.state import state_of
from modewright.modes.storage import MANIFEST_NAME


@dataclass(frozen=True)
class Subject:
    """The model of a run.

    Attributes:
        model: The model.
        source: How it was named, or its class.
        tokenizer: Its tokenizer, if it was loaded from files.
        skeleton: The unmodified model without weights (on the meta device), to restore onto; only
            for a model that was passed as an object.
        files_digest: A digest of the files it came from; ``None`` if it was passed as an object.
    """

    model: nn.Module
    source: str
    tokenizer: Any
    skeleton: nn.Module | None
    files_digest: str | None

    @property
    def from_files(self) -> bool:
        """Whether another process can build the model again from what is saved."""
        return self.skeleton is None

    def revision(self) -> str:
        """Return a digest that changes when the model does; reads every weight of an object."""
        return self.files_digest or _weights_digest(self.model)

    def unmodified(self, folder: Path) -> nn.Module:
        """Return the model as it was, to restore onto; weights are missing."""
        if self.skeleton is not None:
            return self.skeleton
        from modewright.integrations.transformers import build_from_config

        return build_from_config(folder).eval()

    @cached_property
    def predicts_next_token(self) -> bool:
        """Whether it is a language model; one without weights is taken for one."""
        if any(p.is_meta for p in self.model.parameters()):
            return True
        return writes_text(self.model, ordinary_tokens(self.model)[None, :2])

    def encode(self) -> Callable[[str], list[int]]:
        """Return the function from text to token ids.

        Raises:
            DataError: There is no tokenizer.
        """
        if self.tokenizer is None:
            raise DataError(
                "Text can be used only with a tokenizer, and a model passed as an object brings "
                "none: pass calibration and evaluation as batches of token ids, or the model as a "
                "path."
            )
        from modewright.integrations.transformers import encode

        return encode(self.tokenizer)


def open_subject(
    model: object, *, registry: ModeRegistry, device: torch.device | None = None
) -> Subject:
    """Load a model from a path or name, or take one that is there.

    Args:
        model: A path, ``demo:...``, a module or a model-like.
        registry: Where the modes of a model that was optimized before are looked up.
        device: Where a model that is loaded shall be; the CPU if left out.

    Raises:
        DataError: The path or name leads to no model.
        ConfigError: It is something else, or a module that modes have changed already, or one that
            is passed together with a device.
    """
    if isinstance(model, (str, Path)):
        found = _open_files(model, registry)
        found.model.to(device)
        return found
    if device is not None:
        raise ConfigError(
            f"device={str(device)!r} says where a model is loaded; a {type(model).__name__} is "
            "optimized where it is: move it there first."
        )
    root = as_model(model)
    built = root.build() if isinstance(root, ModelLike) else unwrap(root)[0]
    before = state_of(built)
    if before:
        raise ConfigError(
            f"This {type(built).__name__} was changed by modes already "
            f"({', '.join(record.name for record in before)}), and what it was before is not known "
            "here: the result could not be restored to prove it. Pass the folder that it was saved "
            "in, or the unmodified model and all steps in one recipe; or go on with "
            "modewright.apply_mode and modewright.save."
        )
    return Subject(built, type(built).__name__, None, _skeleton(built), None)


def _open_files(source: str | Path, registry: ModeRegistry) -> Subject:
    """Load a model that another program saved, or restore one that an earlier run wrote."""
    from modewright.integrations import transformers as hf

    folder = Path(source)
    if not (folder / MANIFEST_NAME).is_file():
        loaded = hf.load_model(source)
        return Subject(loaded.model, loaded.source, loaded.tokenizer, None, loaded.revision)
    model = restore(hf.build_from_config(folder), folder, registry=registry).eval()
    digest = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    return Subject(model, str(source), hf.load_tokenizer(folder), None, digest)


def _skeleton(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and persistent buffers take no memory."""
    stored = set(model.state_dict())
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in memo and name in stored:
            empty = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in stored:
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}:{tensor_digest(tensor.cpu())};".encode())
    return digest.hexdigest()
