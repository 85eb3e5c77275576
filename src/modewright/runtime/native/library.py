# SPDX-License-Identifier: Apache-2.0
"""Loads the kernel library and describes packed weights to it.

``MODEWRIGHT_NATIVE=0`` switches it off. :func:`library` never raises: where there is none it
returns the reason.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import torch

from modewright.errors import KernelError
from modewright.formats.catalogue import code_values
from modewright.runtime.native.build import library_path
from modewright.runtime.packed_spec import PackedSpec
from modewright.runtime.packed_weight import PackedWeight

SWITCH = "MODEWRIGHT_NATIVE"
ISAS = ("scalar", "avx2", "avx512")
BEST = 3
ACTIVATIONS = {None: 0, "int8_token": 1, "int8_tensor": 2}
ROUNDINGS = {None: 0, "fp8_token": 1, "fp8_tensor": 1, "int8_token": 2, "int8_tensor": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
NO_BIAS = 2
_SCALE_KINDS = {"float32": 0, "float16": 1, "uint8": 2, "float8_e4m3fn": 3}
# Formats whose values are small whole numbers of some unit: (units in 1, what is added to them)
_TABLES = {"fp4_e2m1": (2, 12), "fp6_e2m3": (8, 60)}


class WeightStruct(ctypes.Structure):
    """``mw::Weight`` of ``source/kernel.h``."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("packed_stride", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("zero_point_stride", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("rows_per_scale", ctypes.c_int64),
        ("num_bits", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
        ("zero", ctypes.c_int32),
        ("multiplier", ctypes.c_float),
        ("float_shift", ctypes.c_int32),
        ("float_factor", ctypes.c_float),
        ("values", ctypes.c_void_p),
    )


class Library:
    """The functions of the library."""

    def __init__(self, path: str) -> None:
        loaded = ctypes.CDLL(path)
        self.loaded = loaded
        self.linear = loaded.mw_linear
        self.linear.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int),
        ]
        self.linear.restype = ctypes.c_int
        self.search_scales = loaded.mw_search_scales
        self.search_scales.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self.search_scales.restype = None
        self.float_linear = loaded.mw_float_linear
        self.float_linear.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
        ]
        self.float_linear.restype = None
        self.float_unpack = loaded.mw_float_unpack
        self.float_unpack.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_int, ctypes.c_int),
        ]
        self.float_unpack.restype = None
        self.tiles_linear = loaded.mw_tiles_linear
        self.tiles_linear.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
            *(ctypes.c_void_p, ctypes.c_float, ctypes.c_int),
        ]
        self.tiles_linear.restype = ctypes.c_int
        self.has_tiles = bool(loaded.mw_has_tiles(BEST))
        self._fits = loaded.mw_fits
        self._fits.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self._name = loaded.mw_isa
        self._name.argtypes = [ctypes.c_int]
        self._name.restype = ctypes.c_char_p
        self.isas = tuple(name for place, name in enumerate(ISAS) if self._name(place) is not None)

    def fits(self, spec: PackedSpec, act: str | None, isa: str) -> bool:
        """Whether an instruction set can multiply by such weights."""
        struct, _ = struct_of_spec(spec)
        place, activation = ISAS.index(isa), ACTIVATIONS[act]
        return bool(self._fits(ctypes.addressof(struct), place, activation))


def library() -> Library | str:
    """Return the library, or why there is none."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"switched off by {SWITCH}=0"
    return _loaded()


@cache
def _loaded() -> Library | str:
    try:
        return Library(str(library_path()))
    except (KernelError, OSError) as error:
        return str(error)


# Floats of 8 bits: how far their mantissa is from a float's, and what that one lacks
_FLOATS = {"fp8_e4m3": (20, 2.0**120), "fp8_e5m2": (21, 2.0**112)}


def float_problem(spec: PackedSpec) -> str | None:
    """Return why the library cannot read a weight of floats or of a table, or ``None``."""
    if spec.format in _FLOATS:
        return None
    if spec.format != "nf4":
        return f"{spec.format} is no fp8 and no nf4"
    return "groups of nf4 begin in the middle of a byte" if spec.tile[1] % 2 else None


def tiles_problem(spec: PackedSpec) -> str | None:
    """Return why the library cannot multiply by a weight in tiles, or ``None``."""
    wide = spec.tile[1]
    if spec.num_bits == 7:
        return "codes have 7 bits"
    if wide < spec.shape[1] and wide % (16 if spec.num_bits in (4, 8) else 32):
        return f"groups of {wide} are not whole halves of a tile"
    return None


def format_problem(spec: PackedSpec) -> str | None:
    """Return why the kernel cannot read a format, or ``None``."""
    if spec.format in _TABLES or spec.format.removeprefix("u").startswith("int"):
        return None
    return f"{spec.format} is not a format of small whole numbers"


def struct_of_spec(spec: PackedSpec) -> tuple[WeightStruct, list[ctypes.Array[Any]]]:
    """Return what a spec says of a weight, and the tables that the struct points to."""
    rows, columns = spec.shape
    high, wide = spec.tile
    shapes = spec.tensor_shapes()
    struct = WeightStruct(n=rows, k=columns, group=wide, rows_per_scale=high)
    struct.num_bits = spec.num_bits
    struct.packed_stride = shapes["packed"][0][1]
    struct.scale_stride = shapes["scale"][0][1]
    struct.scale_kind = _SCALE_KINDS[spec.scale_dtype]
    struct.multiplier = 1.0
    struct.zero = 1 << (spec.num_bits - 1)
    if spec.has_zero_point:
        struct.zero_point_stride = shapes["zero_point"][0][1]
    tables: list[ctypes.Array[Any]] = []
    numbers: list[float] = [code - struct.zero for code in range(1 << spec.num_bits)]
    if spec.format in _FLOATS:
        struct.float_shift, struct.float_factor = _FLOATS[spec.format]
    elif spec.format in _TABLES:
        units, struct.zero = _TABLES[spec.format]
        numbers = [value * units for value in code_values(spec.number_format)]
        whole = [int(number) + struct.zero for number in numbers]
        tables.append((ctypes.c_uint8 * 64)(*whole * (64 // len(whole))))
        struct.table = ctypes.addressof(tables[-1])
        struct.multiplier = 1.0 / units
    elif not spec.format.removeprefix("u").startswith("int"):
        numbers = list(code_values(spec.number_format))
    if spec.num_bits <= 6:
        tables.append((ctypes.c_float * 64)(*numbers * (64 // len(numbers))))
        struct.values = ctypes.addressof(tables[-1])
    return struct, tables


class NativeWeight:
    """A packed weight as the kernel reads it: where its tensors are. Nothing is copied.

    Attributes:
        in_tiles: Whether :attr:`Library.tiles_linear` can multiply by it.
    """

    __slots__ = (
        *("address", "columns", "in_tiles", "kept", "kernels", "multiply"),
        *("packed", "packed_at", "rows", "scale", "scale_at"),
    )

    def __init__(self, weight: PackedWeight, kernels: Library) -> None:
        struct, tables = struct_of_spec(weight.spec)
        if weight.global_scale is not None:
            struct.multiplier *= float(weight.global_scale)
        self.multiply, self.kernels = kernels.linear, kernels
        self.rows, self.columns = weight.spec.shape
        self.in_tiles = kernels.has_tiles and tiles_problem(weight.spec) is None
        self.packed, self.scale = weight.packed, weight.scale
        self.kept = (struct, tables, weight.zero_point)
        self.address = ctypes.addressof(struct)
        self.locate()

    def update(self) -> None:
        """Take the addresses anew if tensors were moved."""
        if self.packed.data_ptr() != self.packed_at or self.scale.data_ptr() != self.scale_at:
            self.locate()

    def locate(self) -> None:
        """Take the addresses anew: sharing a model's memory between processes moves tensors."""
        struct, _, zero_point = self.kept
        self.packed_at = struct.packed = self.packed.data_ptr()
        self.scale_at = struct.scale = self.scale.data_ptr()
        if zero_point is not None:
            struct.zero_point = zero_point.data_ptr()
