# SPDX-License-Identifier: Apache-2.0
"""Runs the Triton kernels, as a program of its own: how they run is decided when they are imported.

``python -m support.triton_cases interpret`` multiplies on the CPU and prints the relative error of
every case, ``rows`` quantizes activations there, ``compile`` makes machine code for GPUs that need
not be there and prints what it is.
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
SHAPES = ((40, 224), (17, 256), (5, 32))
ROWS = (1, 3, 40, 150)
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


def rows_of_activations() -> dict[str, float]:
    """Return for each kind of quantized activations how far codes and products are off."""
    os.environ["TRITON_INTERPRET"] = "1"
    from modewright.runtime.backends.gpu_rows import quantize_rows, scale_product, simulate_rows
    from modewright.runtime.backends.portable import simulated

    generator = torch.Generator().manual_seed(0)
    found = {}
    for act in ("int8_token", "int8_tensor", "fp8_token", "fp8_tensor"):
        given = torch.tensor([[0.02]]) if act.endswith("tensor") else None
        x = torch.randn(5, 5000, generator=generator) * 3
        x[1] = 0
        expected = simulated(x, act, given)
        codes, scale = quantize_rows(x, act, given)
        off = (codes.float() * scale - expected).abs().max()
        off += (simulate_rows(x, act, given) - expected).abs().max()
        x[2, 4], x[3, 7] = torch.nan, torch.inf
        codes, scale = quantize_rows(x, act, given)
        known = [True, True, False, given is not None, True]
        found[f"{act}, scales"] = float(scale.flatten().isfinite().tolist() != known)
        found[f"{act}, values"] = float(off)
    product = torch.randint(-1000, 1000, (5, 70), generator=generator, dtype=torch.int32)
    bias, own = torch.randn(70, generator=generator), torch.rand(70, generator=generator)
    scale = torch.rand(5, 1, generator=generator)
    scaled = scale_product(product, scale, own, bias, torch.float32)
    found["products"] = float((scaled - (product * scale * own + bias)).abs().max())
    return found


def compiled() -> dict[str, Any]:
    """Return for each kernel, type and GPU whether there is machine code, and by tensor cores."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modewright.runtime.backends import triton_kernels as kernels

    constants: dict[str, dict[str, Any]] = {
        "one_row": {"OUTPUTS": 8, "COLUMNS": 1024, "HAS_BIAS": True},
        "some_rows": {"OUTPUTS": 64, "COLUMNS": 256, "ROWS": 16, "HAS_BIAS": True},
        "unpacked": {"OUTPUTS": 8, "COLUMNS": 512},
    }
    kinds = {"KIND": "integer", "BITS": 4, "MANTISSA": 0, "FACTOR": 1.0, "SCALE": "plain"}
    kinds |= {"HAS_ZEROS": True, "HAS_LEVEL": False, "RUN": 64, "EVEN": True}
    types = {"packed": "*i32", "zeros": "*u8", "scale": "*fp16", "table": "*fp32"}
    types["level"] = "*fp32"
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
    tasks = {"interpret": interpret, "rows": rows_of_activations, "compile": compiled}
    print(json.dumps(tasks[sys.argv[1]]()))
