# SPDX-License-Identifier: Apache-2.0
"""Tensors are read one by one from the files of a folder, and nothing of a file is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modewright.errors import CheckpointError, DataError
from modewright.integrations.shards import Shards
from support.language_models import save_tiny_llama

NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "llama", tied=False, dtype=torch.bfloat16, shard_size=4000)


def test_tensors_of_all_files_are_read_in_the_wanted_dtype(folder: Path) -> None:
    stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    assert len(list(folder.glob("*.safetensors"))) > 1

    read = dict(Shards(folder).read((name, (name,), torch.float32) for name in stored))

    assert read.keys() == stored.keys()
    for name, tensor in read.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float())


def test_what_is_read_does_not_change_with_the_file(folder: Path) -> None:
    shards = Shards(folder)
    [(_, tensor)] = shards.read([(NORM, (NORM,), torch.bfloat16)])
    before = tensor.clone()
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.seek(-64, os.SEEK_END)
            stream.write(bytes(64))

    assert torch.equal(tensor, before)


def test_a_tied_tensor_is_found_under_any_of_its_names(folder: Path) -> None:
    [(name, tensor)] = Shards(folder).read([("other", ("other", HEAD), torch.float32)])

    assert name == "other"
    assert tensor.shape == (64, 16)


def test_check_names_what_is_missing_and_what_has_another_shape(folder: Path) -> None:
    shards = Shards(folder)
    shards.check({NORM: ((NORM,), torch.Size([16]))})

    with pytest.raises(CheckpointError, match="missing") as raised:
        shards.check({"gone": (("gone",), torch.Size([1])), NORM: ((NORM,), torch.Size([17]))})

    assert "gone: missing" in str(raised.value)
    assert "(16,), expected (17,)" in str(raised.value)


def test_missing_tensor_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks the tensor 'gone'"):
        list(Shards(folder).read([("gone", ("gone",), torch.float32)]))


def test_digest_follows_names_sizes_times_and_config(folder: Path) -> None:
    first = Shards(folder).digest()
    assert Shards(folder).digest() == first

    os.utime(next(folder.glob("*.safetensors")), ns=(1, 1))
    second = Shards(folder).digest()
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")

    assert len({first, second, Shards(folder).digest()}) == 3


@pytest.mark.parametrize("kept", [0, 4, 100])
def test_truncated_file_is_refused(folder: Path, kept: int) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:kept])

    with pytest.raises(CheckpointError, match="Copy it anew"):
        Shards(folder)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "llama")
    (folder / "model.safetensors").unlink()

    with pytest.raises(DataError, match=r"no model\.safetensors"):
        Shards(folder)
