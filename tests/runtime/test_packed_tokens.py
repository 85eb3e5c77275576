# SPDX-License-Identifier: Apache-2.0
"""Vectors as rows of bytes: what comes back is what the fake quantizer leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.errors import ConfigError
from modewright.runtime.activations import ActivationSpec
from modewright.runtime.packed_tokens import TokenPacker

SPECS = [
    ActivationSpec("int8", "token"),
    ActivationSpec("uint4", "token"),
    ActivationSpec("int4", "group", 8),
    ActivationSpec("uint3", "group", 5),
    ActivationSpec("fp8_e4m3", "token"),
    ActivationSpec("fp8_e5m2", "token"),
    ActivationSpec("fp4_e2m1", "group", 16, "e8m0"),
]


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    spec=st.sampled_from(SPECS),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    features=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_stand_for_what_the_fake_quantizer_leaves(
    spec: ActivationSpec, lengths: list[int], features: int, dtype: torch.dtype
) -> None:
    x = vectors(*lengths, features).to(dtype)
    packer = TokenPacker(spec)
    rows = packer.pack(x)

    assert rows.dtype == torch.uint8
    assert rows.shape == (*lengths, packer.width(features))
    assert torch.equal(packer.unpack(rows, features, dtype), spec.simulate(x))


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "int5"])
def test_a_calibrated_scale_is_not_stored_in_rows(name: str) -> None:
    spec = ActivationSpec(name, "tensor", calibrated=True)
    scale = torch.tensor([[0.02]])
    packer, x = TokenPacker(spec, scale), vectors(2, 3, 8)
    rows = packer.pack(x)

    assert rows.shape == (2, 3, 8 * spec.number_format.num_bits // 8)
    assert torch.equal(packer.unpack(rows, 8, torch.float32), spec.simulate(x, scale))


def test_rows_can_be_joined_and_reordered() -> None:
    packer, x = TokenPacker(SPECS[0]), vectors(2, 5, 8)
    rows = torch.cat([packer.pack(x[:, :3]), packer.pack(x[:, 3:])], dim=1)[[1, 0]]

    assert torch.equal(packer.unpack(rows, 8, torch.float32), SPECS[0].simulate(x[[1, 0]]))


@pytest.mark.parametrize(
    ("spec", "scale"),
    [
        (ActivationSpec("int8", "tensor"), None),
        (ActivationSpec("int8", "token"), torch.ones(1, 1)),
        (ActivationSpec("int8", "tensor", calibrated=True), None),
        (ActivationSpec("fp4_e2m1", "group", 16, "e4m3"), None),
    ],
)
def test_what_depends_on_all_tokens_is_refused(
    spec: ActivationSpec, scale: torch.Tensor | None
) -> None:
    with pytest.raises(ConfigError):
        TokenPacker(spec, scale)
