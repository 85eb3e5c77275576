# SPDX-License-Identifier: Apache-2.0
"""Runs the Triton kernels, as a program of its own: how they run is decided when they are imported.

``python -m support.triton_cases interpret`` multiplies on the CPU and prints the relative error of
every case, ``compile`` makes machine code for GPUs that need not be there and prints what it is.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from support.packed_weights import E4M3, E8M0, group, random_weight

WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 group 64": ("int4", group(64)),
    "uint4 group 64": ("uint4", group(64)),
    "uint4 group 48": ("uint4", group(48)),
    "uint2 group 32": ("uint2", group(32)),
    "int8 channel": ("int8", {}),
    "int4 tensor": ("int4", {"granularity": "tensor"}),
    "fp8 channel": ("fp8_e4m3", {}),
    "fp8 block": ("fp8_e4m3", {"granularity": "block", "block_size": (16, 128)}),
    "nf4 group 64": ("nf4", group(64)),
    "nvfp4": ("fp4_e2m1", group(16, **E4M3)),
    "mxfp4": ("fp4_e2m1", group(32, **E8M0)),
}
SHAPES = ((40, 200), (17, 256), (5, 34))
ROWS = (1, 3, 40)
DTYPES = (torch.float32, torch.float16)  # the interpreter knows no products of bfloat16
TARGETS = (80, 90)


def interpret() -> dict[str, float]:
    """Return the relative error of each case."""
    os.environ["TRITON_INTERPRET"] = "1"
    from modewright.runtime.backends.base import Case
    from modewright.runtime.backends.portable import portable_linear
    from modewright.runtime.backends.triton import Triton

    backend, generator = Triton(), torch.Generator().manual_seed(0)
    errors = {}
    for name, (fmt, fields) in WEIGHTS.items():
        for outputs, inputs in SHAPES:
            weight = random_weight(fmt, outputs, inputs, **fields)
            for rows in ROWS:
                for dtype in DTYPES:
                    x = torch.randn(rows, inputs, generator=generator).to(dtype)
                    bias = torch.randn(outputs, generator=generator) if rows > 1 else None
                    assert backend.refuses(Case(weight.spec, "cpu", dtype, None, rows)) is None
                    found = backend.linear(x, backend.prepare(weight), bias, None, None)
                    assert found.dtype == dtype
                    expected = portable_linear(x.double(), weight, None, None, None)
                    expected += 0 if bias is None else bias.double()
                    error = float((found.double() - expected).norm() / expected.norm())
                    key = f"{name}, {outputs}x{inputs}, {rows} rows, {str(dtype).split('.')[1]}"
                    errors[key] = error
    return errors


def compiled() -> dict[str, Any]:
    """Return for each kernel, type and GPU whether there is machine code, and by tensor cores."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modewright.runtime.backends import triton_kernels as kernels

    constants: dict[str, dict[str, Any]] = {
        "few_rows": {"OUTPUTS": 16, "BYTES": 128},
        "many_rows": {"ROWS": 32, "OUTPUTS": 64, "BYTES": 32},
    }
    kinds = {"OFFSET": 8, "BITS": 4, "HAS_ZEROS": True, "HAS_TABLE": False, "HAS_BIAS": True}
    types = {"packed": "*u8", "zeros": "*u8", "scale": "*fp16", "table": "*fp32"}
    found = {}
    for name, sizes in constants.items():
        kernel = getattr(kernels, name)
        fixed = {**kinds, **sizes}
        for number in ("fp16", "bf16", "fp32"):
            known = {**types, **dict.fromkeys(("x", "y", "bias"), f"*{number}")}
            signature = {n: known.get(n, "i32") for n in kernel.arg_names}
            signature |= dict.fromkeys(fixed, "constexpr")
            places = {(kernel.arg_names.index(n),): value for n, value in fixed.items()}
            source = ASTSource(fn=kernel, signature=signature, constexprs=places)
            for target in TARGETS:
                made = triton.compile(source, target=GPUTarget("cuda", target, 32))
                key = f"{name}, {number}, sm_{target}"
                found[key] = {"bytes": len(made.asm["cubin"]), "mma": "mma" in made.asm["ptx"]}
    return found


if __name__ == "__main__":
    print(json.dumps(interpret() if sys.argv[1] == "interpret" else compiled()))
