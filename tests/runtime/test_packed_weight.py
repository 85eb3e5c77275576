# SPDX-License-Identifier: Apache-2.0
"""A packed weight: what its tensors hold, and that it stands for what the fake quantizer gave."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modewright.errors import ConfigError
from modewright.formats.affine import fake_quantize, quantize
from modewright.formats.catalogue import FORMATS, encode
from modewright.formats.floating import FP8_E4M3, round_float
from modewright.formats.reference import unpack_codes, value_of_code
from modewright.formats.scaling import global_scale_of, scale_from_range
from modewright.runtime.packed_weight import PackedSpec, PackedWeight, stored_scale

GROUPINGS: list[dict[str, Any]] = [
    {"granularity": "tensor"},
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 4},
    {"granularity": "group", "group_size": 32},
    {"granularity": "block", "block_size": (3, 5)},
]
each_format = pytest.mark.parametrize("name", FORMATS)
each_grouping = pytest.mark.parametrize("grouping", GROUPINGS, ids=str)


def packed(
    weight: torch.Tensor, name: str, scale_format: str = "fp32", **changes: Any
) -> tuple[PackedWeight, torch.Tensor]:
    """Return a weight packed with max scales, and what the fake quantizer makes of it."""
    dtype = {"fp32": "float32", "e8m0": "uint8", "e4m3": "float8_e4m3fn"}[scale_format]
    values: dict[str, Any] = {"scale_dtype": dtype, "scale_format": scale_format, **changes}
    spec = PackedSpec(name, tuple(weight.shape), **values)
    fmt, grouped = spec.number_format, spec.grouping.split(weight)
    level = global_scale_of(weight.abs().max(), fmt) if scale_format == "e4m3" else None
    ends = torch.aminmax(grouped, dim=-1) if grouped.shape[-1] else (grouped.sum(-1),) * 2
    scale, zero_point = scale_from_range(*ends, fmt, scale_format, level)
    codes = encode(quantize(grouped, scale, zero_point, fmt), fmt)
    stored = scale if level is None else round_float(scale / level, FP8_E4M3)
    effective = stored if level is None else stored * level
    made = PackedWeight.from_codes(
        spec, spec.grouping.join(codes, weight.shape), stored, zero_point, level
    )
    fake = fake_quantize(grouped, effective, zero_point, fmt)
    return made, spec.grouping.join(fake, weight.shape)


def weight_of(rows: int = 7, columns: int = 22, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@each_format
@each_grouping
def test_it_stands_for_what_the_fake_quantizer_gives(name: str, grouping: dict[str, Any]) -> None:
    weight, fake = packed(weight_of(), name, **grouping)

    assert torch.equal(weight.dequantize(), fake)
    assert torch.equal(weight.dequantize(dtype=torch.bfloat16), fake.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "scale_format", "group_size"),
    [
        ("fp4_e2m1", "e4m3", 16),
        ("fp4_e2m1", "e8m0", 32),
        ("fp6_e2m3", "e8m0", 32),
        ("fp8_e4m3", "e8m0", 32),
        ("int8", "e8m0", 32),
    ],
)
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_it_holds_small_scales_exactly(
    name: str, scale_format: str, group_size: int, size: float
) -> None:
    values = weight_of() * size
    weight, fake = packed(values, name, scale_format, granularity="group", group_size=group_size)

    assert weight.scale.element_size() == 1
    assert torch.equal(weight.dequantize(), fake)


@given(
    name=st.sampled_from(sorted(FORMATS)),
    grouping=st.sampled_from(GROUPINGS),
    rows=st.integers(0, 9),
    columns=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_any_shape(name: str, grouping: dict[str, Any], rows: int, columns: int, seed: int) -> None:
    if 0 in (rows, columns):
        weight = PackedWeight.allocate(PackedSpec(name, (rows, columns), **grouping))
        assert weight.dequantize().shape == (rows, columns)
        return
    weight, fake = packed(weight_of(rows, columns, seed), name, **grouping)

    assert torch.equal(weight.dequantize(), fake)
    assert weight.spec.scale_shape == weight.spec.grouping.scale_shape(fake.shape)


@each_format
def test_bytes_are_those_that_the_reference_reads(name: str) -> None:
    weight, fake = packed(weight_of(), name, granularity="channel")
    spec, zeros = weight.spec, weight.zero_points()
    for row in range(7):
        codes = unpack_codes(bytes(weight.packed[row].tolist()), spec.num_bits, 22)
        if spec.code_offset:
            numbers = [float(code - spec.code_offset) for code in codes]
        else:
            numbers = [value_of_code(code, spec.number_format) for code in codes]
        zero = 0.0 if zeros is None else float(zeros[row])
        expected = (np.float32(numbers) - np.float32(zero)) * np.float32(weight.scale[row].item())
        assert expected.tolist() == fake[row].tolist()


def test_signed_integers_are_stored_as_offset_binary() -> None:
    spec = PackedSpec("int4", (1, 4), scale_dtype="float32")
    codes = torch.tensor([[0b1000, 0b1111, 0, 0b0111]], dtype=torch.uint8)  # -8, -1, 0, 7
    weight = PackedWeight.from_codes(spec, codes, torch.ones(1, 1))

    assert weight.packed.tolist() == [[0x70, 0xF8]]
    assert weight.dequantize().tolist() == [[-8.0, -1.0, 0.0, 7.0]]
    assert torch.equal(weight.codes(), codes)


def test_powers_of_two_are_stored_as_the_outside_library_has_them() -> None:
    scale = 2.0 ** torch.arange(-126, 128).float()
    theirs = scale.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)

    assert stored_scale(scale, "uint8").tolist() == theirs.tolist()
    spec = PackedSpec("int8", (1, 254), "group", 1, scale_format="e8m0", scale_dtype="uint8")
    weight = PackedWeight.from_codes(
        spec, torch.ones(1, 254, dtype=torch.uint8), scale.unsqueeze(0)
    )
    assert torch.equal(weight.dequantize(), scale.unsqueeze(0))


def test_scales_in_half_precision_are_rounded_and_no_more() -> None:
    exact, fake = packed(weight_of(), "int4", granularity="group", group_size=4)
    spec = PackedSpec("int4", (7, 22), "group", 4)
    weight = PackedWeight.from_codes(spec, exact.codes(), exact.scale)

    assert weight.scale.dtype == torch.float16
    error = (weight.dequantize() - fake).abs()
    assert bool((error <= fake.abs() * 2**-11).all())
    assert float(error.max()) > 0


@each_grouping
def test_rows_alone_are_those_of_the_whole(grouping: dict[str, Any]) -> None:
    weight, fake = packed(weight_of(), "uint3", **grouping)
    indices = torch.tensor([[6, 0, 3], [3, 3, 5]])

    assert torch.equal(weight.dequantize(slice(2, 5)), fake[2:5])
    assert torch.equal(weight.dequantize(slice(1, None, 2)), fake[1::2])
    assert torch.equal(weight.select_rows(indices), fake[indices])
    assert torch.equal(weight.select_rows(indices, torch.float16), fake[indices].half())


def test_its_size_is_that_of_its_tensors() -> None:
    spec = PackedSpec("uint4", (10, 128), "group", 64)

    assert PackedWeight.allocate(spec).nbytes == 10 * 64 + 10 * 2 * 2 + 10 * 1
    assert PackedWeight.allocate(spec, "meta").packed.is_meta


@pytest.mark.parametrize(
    "spec",
    [
        PackedSpec("int4", (3, 5)),
        PackedSpec("uint2", (3, 5), "group", 2, scale_dtype="float32"),
        PackedSpec("fp8_e4m3", (3, 5), "block", block_size=(2, 2)),
        PackedSpec("fp4_e2m1", (3, 5), "group", 2, None, "e4m3", "float8_e4m3fn"),
    ],
    ids=str,
)
def test_a_spec_is_json(spec: PackedSpec) -> None:
    assert PackedSpec.from_dict(spec.as_dict()) == spec


@pytest.mark.parametrize(
    "recorded",
    [
        None,
        [],
        {},
        {"format": "int4"},
        {"format": "int4", "shape": [3]},
        {"format": "int4", "shape": [3, -1]},
        {"format": "int4", "shape": [3, 2.5]},
        {"format": "int4", "shape": [True, 2]},
        {"format": "int4", "shape": 7},
        {"format": ["int4"], "shape": [3, 5]},
        {"format": "int9", "shape": [3, 5]},
        {"format": "int4", "shape": [3, 5], "other": 1},
        {"format": "int4", "shape": [3, 5], "granularity": "token"},
        {"format": "int4", "shape": [3, 5], "granularity": "group"},
        {"format": "int4", "shape": [3, 5], "granularity": "group", "group_size": 0},
        {"format": "int4", "shape": [3, 5], "group_size": 2},
        {"format": "int4", "shape": [3, 5], "granularity": "block", "block_size": [1]},
        {"format": "int4", "shape": [3, 5], "granularity": "block", "block_size": 3},
        {"format": "int4", "shape": [3, 5], "scale_dtype": "uint8"},
        {"format": "int4", "shape": [3, 5], "scale_format": "e5m2"},
    ],
    ids=str,
)
def test_what_is_no_spec_is_refused(recorded: object) -> None:
    with pytest.raises(ConfigError):
        PackedSpec.from_dict(recorded)


@pytest.mark.parametrize("name", ["packed", "scale", "zero_point", "global_scale"])
@pytest.mark.parametrize("wrong", ["shape", "dtype", "layout", "there"])
def test_tensors_that_do_not_fit_are_refused(name: str, wrong: str) -> None:
    spec = PackedSpec("uint4", (6, 8), "group", 2)
    tensors: dict[str, torch.Tensor | None] = dict(PackedWeight.allocate(spec).tensors())
    tensor = tensors.get(name)
    if wrong == "there":
        tensors[name] = torch.zeros(()) if tensor is None else None
    elif tensor is None:
        return
    elif wrong == "shape":
        tensors[name] = tensor[:-1]
    elif wrong == "dtype":
        tensors[name] = tensor.to(torch.int32)
    else:
        tensors[name] = torch.zeros(tensor.shape[::-1], dtype=tensor.dtype).t()

    with pytest.raises(ConfigError, match=name):
        PackedWeight(spec, **tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        ("float16", 1e-6),
        ("float16", 1e6),
        ("uint8", 3.0),
        ("uint8", float("inf")),
        ("float8_e4m3fn", 1.03),
        ("float8_e4m3fn", 1e4),
        ("bfloat16", 1.0),
    ],
)
def test_scales_that_cannot_be_stored_are_refused(dtype: Any, scale: float) -> None:
    with pytest.raises(ConfigError, match="scales"):
        stored_scale(torch.tensor([[scale]]), dtype)


@pytest.mark.parametrize("zero_point", [-1.0, 16.0, 2.5])
def test_zero_points_that_are_no_codes_are_refused(zero_point: float) -> None:
    spec = PackedSpec("uint4", (1, 2))
    codes, scale = torch.zeros(1, 2, dtype=torch.uint8), torch.ones(1, 1)

    with pytest.raises(ConfigError, match="zero points"):
        PackedWeight.from_codes(spec, codes, scale, torch.full((1, 1), zero_point))
