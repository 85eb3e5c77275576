# SPDX-License-Identifier: Apache-2.0
"""Damaged, foreign and hostile checkpoints: an error, and the model as it was. Nothing else."""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modewright.api import inspect
from modewright.errors import CheckpointError
from modewright.modes.apply import apply_mode
from modewright.modes.checkpoint import restore, save, verify
from modewright.modes.manifest import tensor_digest
from modewright.modes.registry import ModeRegistry
from modewright.modes.storage import HEADER_KEY, MANIFEST_NAME
from support.checkpoints import (
    edit_header,
    edit_manifest,
    edit_tensors,
    read_body,
    sealed,
    tensor_files,
    write_manifest,
)
from support.example_modes import example_registry
from support.models import LM, MLP
from support.photograph import Photograph, contents

REGISTRY = example_registry()
MODES = ["random_mask", "gain"]


def make_checkpoint(path: Path) -> Path:
    return save(apply_mode(LM.make(), MODES, registry=REGISTRY), path)


@pytest.fixture(params=["model.safetensors", "folder"], ids=["file", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / request.param)


def assert_refused(path: Path, text: str = "") -> None:
    """The checkpoint is an error for everyone who reads it, and the model stays as it was."""
    model = LM.make()
    before = Photograph(model)
    with pytest.raises(CheckpointError, match=text or None) as caught:
        restore(model, path, registry=REGISTRY)
    assert len(str(caught.value)) < 2000 + 3 * len(str(path))
    assert before.differences(model) == []


# --- damage to files -----------------------------------------------------------------------------


def flip(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "half": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "trailing garbage": lambda content: content + b"\0" * 8,
    "huge header": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "large header": lambda content: struct.pack("<Q", 2**31) + content[8:],
    "first bit": lambda content: flip(content, 0),
    "last bit": lambda content: flip(content, len(content) - 1),
    "zeros": lambda content: b"\0" * len(content),
    "pickle": lambda content: pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_refused(damage: Callable[[bytes], bytes], path: Path) -> None:
    for file in tensor_files(path):
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        assert_refused(path)
        with pytest.raises(CheckpointError):
            verify(path, registry=REGISTRY)
        file.write_bytes(whole)
    verify(path, registry=REGISTRY)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_manifest_of_a_folder_is_refused(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "folder")
    file = path / MANIFEST_NAME
    file.write_bytes(damage(file.read_bytes()))

    assert_refused(path)
    with pytest.raises(CheckpointError):
        inspect(path)


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("code in a file was run",)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_pickle_in_disguise_is_refused_and_not_run(write: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    if write is pickle.dump:
        file.write_bytes(pickle.dumps(Trap()))
    else:
        torch.save({"weights": Trap()}, file)
    assert_refused(file, "not a readable safetensors file")

    folder = make_checkpoint(tmp_path / "folder")
    tensor_files(folder)[0].write_bytes(file.read_bytes())
    assert_refused(folder)


def test_things_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "text").write_text("x")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "manifest" / MANIFEST_NAME).mkdir(parents=True)
    for name, text in {
        "nowhere": "does not exist",
        "nowhere.safetensors": "does not exist",
        "empty": "holds no mode_state.json",
        "folder.safetensors": "holds no mode_state.json",
        "text": "",
        "foreign.safetensors": "without a mode state",
        "manifest": "",
        "n" * 5000: "",
        "n" * 5000 + ".safetensors": "",
        "a\0b": "",
        "a\0b.safetensors": "",
    }.items():
        assert_refused(tmp_path / name, text)


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "folder")
    tensor_files(path)[0].unlink()
    assert_refused(path, "does not exist")


# --- wrong contents under right digests ----------------------------------------------------------


def first(body: dict[str, Any]) -> dict[str, Any]:
    return body["tensors"]["embed.weight"]


def set_in(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(body: dict[str, Any]) -> None:
        target = body
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return edit


def nest(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = {"a": value}
    return value


METADATA = ("state", "modes", 0, "metadata")
EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "future schema": (set_in("schema_version", value=99), "Upgrade modewright"),
    "schema zero": (set_in("schema_version", value=0), "schema version"),
    "schema text": (set_in("schema_version", value="1"), "schema version"),
    "schema missing": (lambda b: b.pop("schema_version") and None, "schema version"),
    "foreign format": (set_in("format", value="other"), "foreign"),
    "unknown mode": (set_in("state", "modes", 0, "name", value="nope"), "not registered"),
    "unknown config key": (set_in("state", "modes", 1, "config", "x", value=1), "no such field"),
    "config out of range": (set_in("state", "modes", 1, "config", "factor", value=-1), "factor"),
    "state a list": (set_in("state", value=[]), "must hold"),
    "state empty": (set_in("state", value={}), "not a mode state"),
    "modes a dict": (set_in("state", "modes", value={}), "not a mode state"),
    "mode a number": (set_in("state", "modes", 0, value=3), "a record must be"),
    "metadata a list": (set_in(*METADATA, value=[]), "a record must be"),
    "metadata of another mode": (set_in(*METADATA, value={}), "could not be restored"),
    "metadata of another type": (set_in(*METADATA, "masks", value=3), "could not be restored"),
    "state too deep": (set_in(*METADATA, "x", value=nest(200)), "nested"),
    "placeholder without tensor": (set_in(*METADATA, "x", value={"$tensor": "no"}), "missing"),
    "placeholder malformed": (set_in(*METADATA, "x", value={"$tensor": [1]}), "missing"),
    "reserved key": (set_in(*METADATA, "x", value={"$other": 1}), "start with"),
    "tensors a list": (set_in("tensors", value=[]), "must hold"),
    "tensor missing": (lambda b: b["tensors"].pop("embed.weight") and None, "ties|lacks|has"),
    "tensor unknown": (
        lambda b: b["tensors"].update(more=dict(first(b))),
        "lacks",
    ),
    "entry a number": (set_in("tensors", "embed.weight", value=3), "describes"),
    "entry without digest": (lambda b: first(b).pop("sha256") and None, "describes"),
    "entry with more": (lambda b: first(b).update(more=1), "describes"),
    "digest wrong": (lambda b: first(b).update(sha256="0" * 64), "SHA-256 of 1 of"),
    "dtype wrong": (lambda b: first(b).update(dtype=3), "describes"),
    "shape wrong": (lambda b: first(b).update(shape=[1, 2]), "shape"),
    "shape negative": (lambda b: first(b).update(shape=[-1]), "describes"),
    "shape of floats": (lambda b: first(b).update(shape=[1.5]), "describes"),
    "shape of booleans": (lambda b: first(b).update(shape=[True]), "describes"),
    "aliases a list": (set_in("aliases", value=[]), "must hold"),
    "alias of nothing": (set_in("aliases", "head.weight", value="no"), "ties"),
    "alias a list": (set_in("aliases", "head.weight", value=["x"]), "ties"),
    "alias of a stored name": (
        lambda b: b["aliases"].update({"block.fc1.bias": "block.fc2.bias"}),
        "ties",
    ),
    "alias missing": (set_in("aliases", value={}), "head.weight: missing"),
    "alias unknown": (set_in("aliases", "more", value="embed.weight"), "more: not in the model"),
    "absolute file": (lambda b: first(b).update(file="/etc/x.safetensors"), "not the name"),
    "file above": (lambda b: first(b).update(file="../x.safetensors"), "not the name"),
    "file in a folder": (lambda b: first(b).update(file="a/x.safetensors"), "not the name"),
    "file of another kind": (lambda b: first(b).update(file="x.bin"), "not the name"),
    "file with a null byte": (lambda b: first(b).update(file="\0.safetensors"), ""),
    "file with a surrogate": (lambda b: first(b).update(file="\ud800.safetensors"), ""),
    "file with a long name": (lambda b: first(b).update(file="n" * 999 + ".safetensors"), ""),
    "file missing": (lambda b: first(b).update(file="x.safetensors"), ""),
    "digest of the manifest": (
        lambda b: json.dumps({**b, "sha256": "0" * 64}),
        "manifest of .* is damaged",
    ),
    "digest missing": (lambda b: json.dumps({k: b[k] for k in b if k != "sha256"}), "damaged"),
    "nan": (lambda b: json.dumps({**b, "x": float("nan")}), "not valid JSON"),
    "number that overflows": (lambda b: json.dumps(b)[:-1] + ',"x":1e999}', "not valid JSON"),
    "duplicate key": (lambda b: json.dumps(b)[:-1] + ',"aliases":{}}', "twice"),
    "deep nesting": (lambda b: "[" * 50_000 + "]" * 50_000, "not valid JSON"),
    "json list": (lambda b: "[]", "foreign"),
    "json number": (lambda b: "3", "foreign"),
    "no json": (lambda b: "x", "not valid JSON"),
    "no text": (lambda b: "", "not valid JSON"),
}


@pytest.mark.parametrize(("edit", "text"), EDITS.values(), ids=EDITS)
def test_manifest_that_says_something_wrong_is_refused(
    edit: Callable[[dict[str, Any]], Any], text: str, path: Path
) -> None:
    edit_manifest(path, edit)
    assert_refused(path, text)


def resealed(path: Path) -> None:
    """Make the digests in the manifest those of the tensors that are stored now."""
    from support.checkpoints import read_tensors

    stored = {name: t for file in tensor_files(path) for name, t in read_tensors(file).items()}
    body = read_body(path)
    for name, entry in body["tensors"].items():
        if name in stored:
            entry.update(
                dtype=str(stored[name].dtype),
                shape=list(stored[name].shape),
                sha256=tensor_digest(stored[name]),
            )
    write_manifest(path, sealed(body))


TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda t: t.pop("block.fc1.bias"), "lacks"),
    "too much": (lambda t: t.update(more=torch.zeros(1)), "has"),
    "wrong shape": (
        lambda t: t.update({"block.fc1.bias": torch.zeros(3)}),
        r"block\.fc1\.bias: torch\.float32 \(3,\)",
    ),
    "wrong dtype": (
        lambda t: t.update({"block.fc1.bias": t["block.fc1.bias"].double()}),
        r"torch\.float64",
    ),
}


@pytest.mark.parametrize(("edit", "text"), TENSOR_EDITS.values(), ids=TENSOR_EDITS)
def test_tensors_that_do_not_fit_are_refused(
    edit: Callable[[dict[str, Any]], Any], text: str, path: Path
) -> None:
    edit_tensors(path, edit)
    assert_refused(path)
    resealed(path)
    assert_refused(path, text)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown dtype": lambda h: h["embed.weight"].update(dtype="F99"),
    "rare dtype": lambda h: h["embed.weight"].update(dtype="F4"),
    "other dtype": lambda h: h["embed.weight"].update(dtype="I32"),
    "offsets too large": lambda h: h["embed.weight"].update(data_offsets=[0, 2**40]),
    "offsets reversed": lambda h: h["embed.weight"].update(data_offsets=[8, 0]),
    "offsets negative": lambda h: h["embed.weight"].update(data_offsets=[-8, 0]),
    "shape too large": lambda h: h["embed.weight"].update(shape=[2**62, 2**62]),
    "shape other": lambda h: h["embed.weight"].update(shape=[1]),
    "entry no dict": lambda h: h.update({"embed.weight": 3}),
    "list": lambda h: [1],
}


@pytest.mark.parametrize("edit", HEADERS.values(), ids=HEADERS)
def test_safetensors_header_that_says_something_wrong_is_refused(
    edit: Callable[[dict[str, Any]], Any], path: Path
) -> None:
    edit_header(path, edit)
    assert_refused(path)
    with pytest.raises(CheckpointError):
        verify(path, registry=REGISTRY)


def test_checkpoint_of_another_model_is_refused_with_what_differs(path: Path) -> None:
    model = MLP.make()
    before = Photograph(model)

    with pytest.raises(CheckpointError, match="does not fit this model"):
        restore(model, path, registry=REGISTRY)
    assert before.differences(model) == []


def test_checkpoint_of_a_model_of_another_dtype_is_refused(path: Path) -> None:
    model = LM.make().half()
    before = Photograph(model)

    with pytest.raises(
        CheckpointError, match=r"torch\.float32 .* in the checkpoint, torch\.float16"
    ):
        restore(model, path, registry=REGISTRY)
    assert before.differences(model) == []


def test_missing_mode_says_who_recorded_it(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"RandomMaskMode.*Install or import"):
        restore(LM.make(), path, registry=ModeRegistry())
    with pytest.raises(CheckpointError, match="not registered"):
        verify(path, registry=ModeRegistry())


def test_failure_is_told_without_a_false_word_about_the_model(path: Path) -> None:
    edit_manifest(path, set_in(*METADATA, value={}))

    with pytest.raises(CheckpointError) as caught:
        restore(LM.make(), path, registry=REGISTRY)
    assert "which is as it was" in str(caught.value)
    assert "half converted" not in str(caught.value)


def test_model_with_other_than_tensors_in_its_state_dict_is_refused(
    tmp_path: Path,
) -> None:
    class Extra(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def get_extra_state(self) -> Any:
            return self.value

        def set_extra_state(self, state: Any) -> None:
            self.value = state

    path = save(Extra(torch.ones(2)), tmp_path / "m.safetensors")
    model = Extra({"not": "a tensor"})
    with pytest.raises(CheckpointError, match="_extra_state"):
        restore(model, path, registry=REGISTRY)
    assert model.value == {"not": "a tensor"}
    assert restore(Extra(torch.zeros(2)), path, registry=REGISTRY).value.tolist() == [1, 1]


# --- random damage -------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        start = rng.randrange(len(content))
        return content[:start] + rng.randbytes(rng.randint(1, 16)) + content[start:]
    # Half of the flips go to the head, where the structure is.
    reach = len(content) if kind == 2 else min(len(content), 400)
    for _ in range(rng.choice((1, 1, 3))):
        content = flip(content, rng.randrange(reach), rng.randrange(8))
    return content


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_is_refused_or_harmless(seed: int, path: Path) -> None:
    rng = random.Random(seed)
    expected = contents(restore(LM.make(), path, registry=REGISTRY))
    files = [*tensor_files(path), *path.glob("*.json")] if path.is_dir() else [path]
    model = LM.make()
    before = Photograph(model)
    refused = 0
    for _ in range(40):
        file = rng.choice(files)
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, rng))
        try:
            restored = restore(model, path, registry=REGISTRY)
        except CheckpointError:
            refused += 1
            assert before.differences(model) == []
        else:
            assert contents(restored) == expected
            model = LM.make()
            before = Photograph(model)
        file.write_bytes(whole)
    assert refused > 20


def test_header_key_is_where_the_manifest_lies(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m.safetensors")
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])

    header = json.loads(content[8 : 8 + length])
    assert json.loads(header["__metadata__"][HEADER_KEY])["schema_version"] == 1
