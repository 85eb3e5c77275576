# SPDX-License-Identifier: Apache-2.0
"""The kernel reads nothing beyond its tensors: they end where memory ends that may be read.

It runs in processes of its own, which a wrong read would end.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from modewright.runtime.native.library import library

LIBRARY = library()
pytestmark = [
    pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no kernel library: {LIBRARY}"),
    pytest.mark.skipif(sys.platform == "win32", reason="memory is guarded with mprotect"),
]

GUARDED = """
import ctypes, mmap
import torch
from modewright.runtime.backends.base import Case
from modewright.runtime.backends.native import Native
from modewright.runtime.native.library import library
from support.packed_weights import group, random_weight

libc, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

def at_the_end(tensor):
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    moved = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages * page - size)
    moved.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    if libc.mprotect(ctypes.c_void_p(start + pages * page), page, 0):
        raise OSError(ctypes.get_errno())
    kept.append(memory)
    return moved.view(tensor.dtype).view(tensor.shape)

count = 0
for isa in library().isas:
    for fmt in ("int2", "int3", "int4", "uint4", "uint5", "int6", "int7", "int8", "fp4_e2m1"):
        for fields in (group(32), group(64), {}):
            for n, k in ((1, 1), (3, 65), (17, 127), (16, 128), (33, 576), (48, 1088)):
                for rows, act in ((1, None), (3, None), (13, None), (13, "int8_token")):
                    weight = random_weight(fmt, n, k, **fields)
                    backend, x, bias = Native(isa), torch.randn(rows, k), torch.randn(n)
                    if backend.refuses(Case(weight.spec, "cpu", x.dtype, act, rows)):
                        continue
                    plain = backend.linear(x, backend.prepare(weight), bias, act, None)
                    guarded = weight.map(at_the_end)
                    y = backend.linear(
                        at_the_end(x), backend.prepare(guarded), at_the_end(bias), act, None
                    )
                    assert torch.equal(y, plain), (isa, fmt, fields, n, k, rows)
                    count += 1
print(count)
"""

FORKED = """
import os
import torch
from modewright.runtime.backends.native import Native
from support.packed_weights import group, random_weight

torch.set_num_threads(2)
weight, x = random_weight("int4", 512, 256, **group(64)), torch.randn(1, 256)
backend = Native()
prepared = backend.prepare(weight)
before = backend.linear(x, prepared, None, None, None)
child = os.fork()
after = backend.linear(x, prepared, None, None, None)
if not child:
    os._exit(0 if torch.equal(before, after) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(before, after))
"""


def run(code: str) -> str:
    tests = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(tests)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_read_beyond_the_end_of_a_tensor() -> None:
    assert int(run(GUARDED)) > 300


def test_a_forked_process_has_threads_of_its_own() -> None:
    assert run(FORKED).split() == ["0", "True"]
