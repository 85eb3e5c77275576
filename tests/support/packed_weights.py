# SPDX-License-Identifier: Apache-2.0
"""Packed weights of random codes, of every format and granularity."""

from __future__ import annotations

from typing import Any

import torch

from modewright.formats.catalogue import FORMATS, code_values
from modewright.runtime.packed_weight import PackedSpec, PackedWeight

E8M0 = {"scale_format": "e8m0", "scale_dtype": "uint8"}
E4M3 = {"scale_format": "e4m3", "scale_dtype": "float8_e4m3fn"}


def random_weight(fmt: str, n: int, k: int, *, seed: int = 0, **fields: Any) -> PackedWeight:
    """Return a weight whose codes, scales and zero points are random; all its values are finite."""
    made = torch.Generator().manual_seed(seed)
    spec = PackedSpec(fmt, (n, k), **fields)
    values = torch.tensor(code_values(FORMATS[fmt]))
    finite = values.isfinite().nonzero().flatten()
    codes = finite[torch.randint(0, len(finite), (n, k), generator=made)].to(torch.uint8)
    scale = torch.rand(spec.scale_shape, generator=made) * 0.1 + 0.01
    level = None
    if spec.scale_format == "e8m0":
        scale = torch.exp2(torch.randint(-6, -1, spec.scale_shape, generator=made).float())
    if spec.scale_format == "e4m3":
        scale = (scale * 100).to(torch.float8_e4m3fn).float()
        level = torch.tensor(0.01)
    zero_point = None
    if spec.has_zero_point:
        largest = 1 << spec.num_bits
        zero_point = torch.randint(0, largest, spec.scale_shape, generator=made).float()
    return PackedWeight.from_codes(spec, codes, scale, zero_point, level)


def group(size: int, **fields: Any) -> dict[str, Any]:
    """Return the fields of a spec with groups."""
    return {"granularity": "group", "group_size": size, **fields}


WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "uint8": ("uint8", {}),
    "int4 g32": ("int4", group(32)),
    "uint4 g64": ("uint4", group(64)),
    "uint4 channel": ("uint4", {}),
    "int3 g64": ("int3", group(64)),
    "uint2 g64": ("uint2", group(64)),
    "fp8": ("fp8_e4m3", {}),
    "fp8 tensor": ("fp8_e5m2", {"granularity": "tensor", "scale_dtype": "float32"}),
    "fp8 block": ("fp8_e4m3", {"granularity": "block", "block_size": (32, 128)}),
    "mxfp4": ("fp4_e2m1", group(32, **E8M0)),
    "mxfp6": ("fp6_e3m2", group(32, **E8M0)),
    "nvfp4": ("fp4_e2m1", group(16, **E4M3)),
    "nf4": ("nf4", group(64)),
}
"""Every kind of weight that backends are held to: its format, and the other fields of its spec."""
