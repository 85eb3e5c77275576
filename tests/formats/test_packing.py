# SPDX-License-Identifier: Apache-2.0
"""Codes as dense bytes: known ones, numpy's, the reference's, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.errors import ConfigError
from modewright.formats.packing import pack, packed_size, unpack
from modewright.formats.reference import pack_codes, unpack_codes

each_width = pytest.mark.parametrize("num_bits", range(1, 9))


def random_codes(num_bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_bits)
    return torch.randint(0, 1 << num_bits, shape, dtype=torch.uint8, generator=generator)


def as_codes(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("num_bits", "codes", "expected"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000001, 1]),
        (2, [1, 2, 3, 0, 2], [0b00_11_10_01, 2]),
        (3, [0b001, 0b010, 0b111, 0b100], [0b11_010_001, 0b100_1]),
        (4, [0x1, 0xA, 0xF], [0xA1, 0x0F]),
        (5, [0b00001, 0b11111], [0b111_00001, 0b11]),
        (6, [0b000001, 0b100011, 0b111111], [0b11_000001, 0b1111_1000, 0b11]),
        (7, [0b1000001, 0b0000011], [0b1_1000001, 0b1]),
        (8, [1, 254], [1, 254]),
    ],
)
def test_known_bytes(num_bits: int, codes: list[int], expected: list[int]) -> None:
    assert pack(as_codes(codes), num_bits).tolist() == expected
    assert list(pack_codes(codes, num_bits)) == expected


@given(
    num_bits=st.integers(1, 8),
    lengths=st.lists(st.integers(0, 3), max_size=2),
    n=st.integers(0, 40),
)
def test_packing_and_unpacking_changes_nothing(num_bits: int, lengths: list[int], n: int) -> None:
    codes = random_codes(num_bits, *lengths, n)
    packed = pack(codes, num_bits)
    assert packed.shape == (*lengths, packed_size(n, num_bits))
    assert torch.equal(unpack(packed, num_bits, n), codes)


@given(num_bits=st.integers(1, 8), data=st.data())
def test_bytes_are_those_of_the_reference(num_bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, (1 << num_bits) - 1), max_size=40))
    packed = pack_codes(codes, num_bits)
    assert pack(as_codes(codes), num_bits).tolist() == list(packed)
    assert unpack_codes(packed, num_bits, len(codes)) == codes
    assert unpack(as_codes(list(packed)), num_bits, len(codes)).tolist() == codes


@each_width
def test_bytes_are_those_of_numpy(num_bits: int) -> None:
    codes = random_codes(num_bits, 5, 77)
    bits = np.unpackbits(codes.numpy()[..., None], axis=-1, count=num_bits, bitorder="little")
    theirs = np.packbits(bits.reshape(5, -1), axis=-1, bitorder="little")
    assert np.array_equal(pack(codes, num_bits).numpy(), theirs)


@each_width
def test_all_pairs_of_neighbours_survive(num_bits: int) -> None:
    every = torch.arange(1 << num_bits, dtype=torch.uint8)
    pairs = torch.cartesian_prod(every, every)
    assert torch.equal(unpack(pack(pairs, num_bits), num_bits, 2), pairs)


@each_width
def test_strides_do_not_matter_and_nothing_given_is_changed(num_bits: int) -> None:
    codes = random_codes(num_bits, 16, 8)
    before = codes.clone()
    packed = pack(codes.t(), num_bits)
    assert torch.equal(packed, pack(codes.t().contiguous(), num_bits))
    wide = torch.stack([packed, packed], dim=-1)[..., 0]
    assert torch.equal(unpack(wide, num_bits, 16), codes.t())
    packed.zero_()
    assert torch.equal(codes, before)


@pytest.mark.parametrize("num_bits", [-1, 0, 9])
def test_a_width_that_does_not_exist_is_refused(num_bits: int) -> None:
    with pytest.raises(ConfigError, match=f"1 to 8; received {num_bits}"):
        pack(as_codes([0]), num_bits)
    with pytest.raises(ConfigError, match=f"1 to 8; received {num_bits}"):
        unpack(as_codes([0]), num_bits, 1)


@pytest.mark.parametrize("num_bits", range(1, 8))
def test_a_code_too_large_for_the_width_is_refused(num_bits: int) -> None:
    with pytest.raises(ConfigError, match=f"codes of {num_bits} bits; received {1 << num_bits}"):
        pack(as_codes([0, 1 << num_bits]), num_bits)


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.tensor(1, dtype=torch.uint8)], ids=str)
def test_what_is_no_tensor_of_codes_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="expected a tensor of uint8"):
        pack(bad, 4)
    with pytest.raises(ConfigError, match="expected a tensor of uint8"):
        unpack(bad, 4, 1)


@pytest.mark.parametrize(("length", "n"), [(2, 5), (3, 4), (0, 1), (0, -1), (1, 0)])
def test_bytes_that_do_not_fit_the_number_of_codes_are_refused(length: int, n: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        unpack(torch.zeros(length, dtype=torch.uint8), 4, n)
