# SPDX-License-Identifier: Apache-2.0
"""Memory for tensors in huge pages."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn

import modewright
from modewright.runtime import huge_pages
from modewright.runtime.huge_pages import CHUNK_BYTES, PAGE_BYTES, SMALL_BYTES, HugePages


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[huge_pages.mmap.mmap]]:
    """Return what will hold the chunks that are made."""
    if huge_pages._HUGE is None:
        pytest.skip("no huge pages on this system")
    made: list[weakref.ref[huge_pages.mmap.mmap]] = []

    class Watched(huge_pages.mmap.mmap):
        def __new__(cls, *args: int, **kwargs: int) -> Watched:
            chunk = super().__new__(cls, *args, **kwargs)
            made.append(weakref.ref(chunk))
            return chunk

    monkeypatch.setattr(huge_pages.mmap, "mmap", Watched)
    return made


def sizes(chunks: list[weakref.ref[huge_pages.mmap.mmap]]) -> list[int]:
    found = [chunk() for chunk in chunks]
    return [len(chunk) for chunk in found if chunk is not None]


def test_memory_is_freed_with_the_last_tensor_in_it(
    chunks: list[weakref.ref[huge_pages.mmap.mmap]],
) -> None:
    memory = HugePages(8 * SMALL_BYTES)
    one, two = (memory.moved(torch.full((SMALL_BYTES,), value)) for value in (1.0, 2.0))
    del memory
    assert sizes(chunks) == [8 * SMALL_BYTES]
    del one
    gc.collect()
    assert len(sizes(chunks)) == 1
    assert torch.equal(two, torch.full((SMALL_BYTES,), 2.0))
    del two
    gc.collect()
    assert sizes(chunks) == []


def test_chunks_grow_with_what_was_taken_if_nobody_says_how_much_it_will_be(
    chunks: list[weakref.ref[huge_pages.mmap.mmap]],
) -> None:
    memory = HugePages()
    kept = [memory.take([2**20], torch.uint8) for _ in range(200)]
    usable = [size - PAGE_BYTES if size > PAGE_BYTES else size for size in sizes(chunks)]
    assert usable == [2**20 * size for size in (1, 1, 2, 4, 8, 16, 32, 64, 64, 64)]
    assert max(usable) == CHUNK_BYTES
    assert all(tensor.data_ptr() % PAGE_BYTES == 0 for tensor in kept[2::2])
    places = sorted(tensor.data_ptr() for tensor in kept)
    assert all(after - before >= 2**20 for before, after in itertools.pairwise(places))


def test_values_are_moved_as_they_are_and_small_tensors_stay() -> None:
    memory = HugePages()
    tensor = torch.randn(SMALL_BYTES)
    moved = memory.moved(tensor)
    assert torch.equal(moved, tensor)
    assert moved.data_ptr() != tensor.data_ptr()
    small, elsewhere = torch.randn(3), torch.empty(SMALL_BYTES, device="meta")
    assert memory.moved(small) is small
    assert memory.moved(elsewhere) is elsewhere


def test_packed_weights_lie_there(chunks: list[weakref.ref[huge_pages.mmap.mmap]]) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
    packed = modewright.apply_mode(model, [("quantize", {"scheme": "w8a16"}), "compress"])
    assert sizes(chunks) == [512 * 256, 512 * 256]
    assert packed(torch.randn(2, 256)).shape == (2, 256)
