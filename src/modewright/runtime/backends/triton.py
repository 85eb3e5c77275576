# SPDX-License-Identifier: Apache-2.0
"""modewright's kernels for GPUs: codes become numbers in registers, written in Triton."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from modewright.formats.catalogue import code_values
from modewright.formats.floating import FloatFormat
from modewright.formats.integer import IntegerFormat
from modewright.runtime.backends.base import Backend, Case
from modewright.runtime.backends.gpu_rows import has_kernels, knows, on_device_of, simulate_rows
from modewright.runtime.backends.portable import simulated
from modewright.runtime.packed_spec import PackedSpec
from modewright.runtime.packed_weight import PackedWeight

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LONGEST_RUN, _SHORTEST_RUN = 64, 16
_ONE_BY_ONE = 2  # rows, that each read the weight, which a cache may hold
_BY_TILES = 128  # rows: beyond, unpacking the whole weight is a small part
_PROGRAMS = 512  # that keep a large GPU busy


class TritonWeight(NamedTuple):
    """A packed weight as the kernels read it.

    Attributes:
        tensors: The first arguments of all kernels: words, scales, zero points, table, level.
        sizes: Their arguments that are numbers.
        constants: Those that they are compiled for.
        extra_bytes: Memory besides that of the packed weight.
    """

    tensors: tuple[torch.Tensor, ...]
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    extra_bytes: int


class Triton(Backend):
    """Products of packed weights with activations in 16 or 32 bits.

    With ``TRITON_INTERPRET=1`` in the environment they run on a CPU as well, to be tested.
    """

    name = "triton"
    summary = "own kernels in Triton: codes become numbers in registers, then multiplied as floats"
    needs = (
        "a GPU and the package triton; codes of 2, 4 or 8 bits, rows of whole words, groups of "
        "a multiple of 16"
    )
    accuracy = 1e-2

    def refuses(self, case: Case) -> str | None:  # noqa: D102
        spec = case.spec
        if not has_kernels(case.device):
            return f"it runs on a GPU, not on {case.device}, and needs the package triton"
        if case.dtype not in _DTYPES:
            return f"it takes float16, bfloat16 and float32, not {case.dtype}"
        if spec.num_bits not in (2, 4, 8):
            return f"codes have 2, 4 or 8 bits; here {spec.num_bits}"
        if spec.shape[1] * spec.num_bits % 32:
            return f"rows are words of 32 bits; here {spec.shape[1]} codes of {spec.num_bits} bits"
        if _run(spec) < _SHORTEST_RUN:
            return f"groups are multiples of {_SHORTEST_RUN} columns; here {spec.tile[1]}"
        return "the weight is empty" if 0 in spec.shape else None

    def prepare(self, weight: PackedWeight) -> TritonWeight:  # noqa: D102
        spec, scale = weight.spec, weight.scale
        table, constants = None, _constants(spec)
        if constants["KIND"] == "table":
            table = torch.tensor(code_values(spec.number_format), device=weight.device)
        constants["HAS_LEVEL"] = weight.global_scale is not None
        constants["HAS_ZEROS"] = weight.zero_point is not None
        scale = scale.view(torch.uint8) if constants["SCALE"] == "e4m3" else scale
        optional = (weight.zero_point, table, weight.global_scale)
        words = weight.packed.view(torch.int32)
        high, wide = spec.tile
        zeros_stride = 0 if weight.zero_point is None else weight.zero_point.shape[1]
        return TritonWeight(
            # a scale stands for what is not read
            tensors=(words, scale, *(scale if t is None else t for t in optional)),
            sizes=(*spec.shape, words.shape[1], scale.shape[1], zeros_stride, high, wide),
            constants=constants,
            extra_bytes=0 if table is None else table.nbytes,
        )

    def linear(  # noqa: D102
        self,
        x: torch.Tensor,
        prepared: TritonWeight,
        bias: torch.Tensor | None,
        act: str | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        outputs, columns = prepared.sizes[:2]
        rows = x.reshape(-1, columns).contiguous()
        if act is not None:
            simulate = simulate_rows if knows(act) else simulated
            rows = simulate(rows, act, act_scale).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        with on_device_of(x):
            if len(rows) <= _ONE_BY_ONE:
                result = _one_by_one(rows, prepared, bias)
            elif len(rows) <= _BY_TILES and x.dtype is not torch.float32:
                result = _by_tiles(rows, prepared, bias)
            else:
                result = F.linear(rows, _unpacked(prepared, x.dtype), bias)
        return result.reshape(*x.shape[:-1], outputs)

    def extra_bytes(self, prepared: TritonWeight) -> int:  # noqa: D102
        return prepared.extra_bytes


def _one_by_one(
    rows: torch.Tensor, weight: TritonWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    outputs = weight.sizes[0]
    result = rows.new_empty(len(rows), outputs)
    if len(rows):
        tile = _tile(weight, 8, 1024 if weight.constants["BITS"] < 8 else 512)
        _kernels().one_row[(-(-outputs // tile["OUTPUTS"]), len(rows))](
            *(rows, *weight.tensors, rows if bias is None else bias.contiguous(), result),
            *weight.sizes,
            **weight.constants,
            **tile,
            HAS_BIAS=bias is not None,
            num_warps=2,
        )
    return result


def _by_tiles(rows: torch.Tensor, weight: TritonWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply; where there are few tiles, columns are parted, and the parts added up."""
    outputs, columns = weight.sizes[:2]
    high = 16 if len(rows) <= 16 else 64
    tile = _tile(weight, 64, 256 if high == 16 else 128)
    tiles = (-(-outputs // tile["OUTPUTS"]), -(-len(rows) // high))
    steps = -(-columns // tile["COLUMNS"])
    parts = max(1, min(8, _PROGRAMS // (tiles[0] * tiles[1]), steps // 4))
    each = -(-steps // parts) * tile["COLUMNS"]
    whole = parts == 1
    result = rows.new_empty(parts, len(rows), outputs, dtype=rows.dtype if whole else torch.float32)
    grid = (*tiles, parts)
    _kernels().some_rows[grid](
        *(rows, *weight.tensors, rows if bias is None else bias.contiguous(), result),
        *(len(rows), each, *weight.sizes),
        **weight.constants,
        **tile,
        ROWS=high,
        HAS_BIAS=bias is not None and whole,
        num_warps=4,
        num_stages=4 if high == 16 else 3,
    )
    if whole:
        return result[0]
    total = result.sum(0)
    return (total if bias is None else total + bias).to(rows.dtype)


def _unpacked(weight: TritonWeight, dtype: torch.dtype) -> torch.Tensor:
    outputs, columns = weight.sizes[:2]
    words = weight.tensors[0]
    result = torch.empty(outputs, columns, dtype=dtype, device=words.device)
    tile = _tile(weight, 8, 512)
    _kernels().unpacked[(-(-outputs // tile["OUTPUTS"]), -(-columns // tile["COLUMNS"]))](
        *weight.tensors, result, *weight.sizes, **weight.constants, **tile, num_warps=4
    )
    return result


def _tile(weight: TritonWeight, outputs: int, columns: int) -> dict[str, Any]:
    """Return the largest tile of that size that the weight fills, and whether it does evenly."""
    smallest = max(weight.constants["RUN"], 32)
    while columns > smallest and columns // 2 >= weight.sizes[1]:
        columns //= 2
    even = weight.sizes[0] % outputs == 0 and weight.sizes[1] % columns == 0
    return {"OUTPUTS": outputs, "COLUMNS": columns, "EVEN": even}


def _constants(spec: PackedSpec) -> dict[str, Any]:
    number = spec.number_format
    found: dict[str, Any] = {"KIND": "table", "MANTISSA": 0, "FACTOR": 1.0}
    if isinstance(number, IntegerFormat):
        found["KIND"] = "integer"
    elif isinstance(number, FloatFormat):
        found["KIND"], found["MANTISSA"] = "float", number.mantissa_bits
        found["FACTOR"] = 2.0 ** (127 - number.bias)
    scale = spec.scale_format if spec.scale_format in ("e8m0", "e4m3") else "plain"
    return {**found, "BITS": spec.num_bits, "SCALE": scale, "RUN": _run(spec)}


def _run(spec: PackedSpec) -> int:
    """Return how many neighbouring columns share a scale, a power of two."""
    if spec.scale_shape[1] == 1:
        return _LONGEST_RUN
    wide = spec.tile[1]
    return min(wide & -wide, _LONGEST_RUN)


@cache
def _kernels() -> Any:
    return importlib.import_module("modewright.runtime.backends.triton_kernels")
