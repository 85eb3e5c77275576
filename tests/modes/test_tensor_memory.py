# SPDX-License-Identifier: Apache-2.0
"""Reading tensors of a safetensors file straight into memory of their own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modewright.errors import CheckpointError
from modewright.modes.tensor_memory import read_into_memory
from modewright.runtime import huge_pages
from modewright.runtime.huge_pages import CHUNK_BYTES, SMALL_BYTES

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16]


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    made = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return made.view(dtype).reshape(shape)


def read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as reader:
        return dict(read_into_memory(path, reader, list(reader.keys())))


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("huge", [True, False], ids=["huge-pages", "ordinary-pages"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_aligned_and_alone_in_its_storage(
    tmp_path: Path, dtype: torch.dtype, huge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not huge:
        monkeypatch.setattr(huge_pages, "_HUGE", None)
    torch.manual_seed(0)
    shapes = [(), (0,), (3, 0, 2), (7,), (5, SMALL_BYTES), (1, 3, SMALL_BYTES + 1), (11, 13)]
    stored = {f"t{i}": random_tensor(dtype, *shape) for i, shape in enumerate(shapes)}
    save_file(stored, tmp_path / "t.safetensors")
    found = read(tmp_path / "t.safetensors")
    assert set(found) == set(stored)
    for name, tensor in found.items():
        assert same_bytes(tensor, stored[name]), name
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert same_bytes(copy.deepcopy(tensor), stored[name])


def test_tensors_that_fill_several_chunks_do_not_overlap(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = CHUNK_BYTES // 3 + 100
    stored = {f"t{i}": random_tensor(torch.uint8, size) for i in range(5)}
    stored["large"] = random_tensor(torch.uint8, CHUNK_BYTES + 5)
    save_file(stored, tmp_path / "t.safetensors")
    found = read(tmp_path / "t.safetensors")
    found["t0"].zero_()
    assert all(same_bytes(found[n], t) for n, t in stored.items() if n != "t0")


def test_a_file_that_is_cut_off_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(SMALL_BYTES)}, path)
    with safe_open(path, framework="pt") as reader:
        content = path.read_bytes()
        other = tmp_path / "short.safetensors"
        other.write_bytes(content[:-10])
        with pytest.raises(CheckpointError, match="ended 10 bytes too early"):
            list(read_into_memory(other, reader, ["a"]))
