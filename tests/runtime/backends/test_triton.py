# SPDX-License-Identifier: Apache-2.0
"""The kernels for GPUs: run by Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modewright.runtime.backends.base import Case
from modewright.runtime.backends.triton import Triton
from support.packed_weights import group, random_weight

TESTS = Path(__file__).parents[2]


def program(task: str, **environment: str) -> dict[str, Any]:
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(TESTS), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, "-m", "support.triton_cases", task],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_products_are_those_of_the_unpacked_weights() -> None:
    errors = program("interpret")

    assert len(errors) == 11 * 3 * 4 * 2
    for case, error in errors.items():
        assert error < (1e-5 if "float32" in case else 1e-2), case


def test_activations_are_quantized_as_they_are_simulated() -> None:
    for case, error in program("rows").items():
        assert error < 1e-4, case


def test_kernels_become_machine_code_and_use_tensor_cores(tmp_path: Path) -> None:
    found = program("compile", TRITON_CACHE_DIR=str(tmp_path))

    assert len(found) == 3 * 3 * 2
    assert all(entry["bytes"] > 1000 for entry in found.values())
    by_tensor_cores = {case for case, entry in found.items() if entry["mma"]}
    assert by_tensor_cores == {c for c in found if "some_rows" in c and "fp32" not in c}


def test_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = random_weight("int4", 8, 64, **group(32)).spec
    odd = random_weight("int3", 8, 64, **group(32)).spec
    backend = Triton()

    assert backend.refuses(Case(spec, "cpu", torch.float32, None, 1)) == (
        "it runs on a GPU, not on cpu, and needs the package triton"
    )
    pytest.importorskip("triton")
    assert backend.refuses(Case(spec, "cuda", torch.float16, None, 1)) is None
    short = random_weight("int4", 8, 60, **group(60)).spec
    narrow = random_weight("int4", 8, 64, **group(24)).spec
    assert "whole words" in backend.needs
    assert "here 60 codes" in str(backend.refuses(Case(short, "cuda", torch.float16, None, 1)))
    assert "here 24" in str(backend.refuses(Case(narrow, "cuda", torch.float16, None, 1)))
    assert "here 3" in str(backend.refuses(Case(odd, "cuda", torch.float16, None, 1)))
    assert "not torch.float64" in str(backend.refuses(Case(spec, "cuda", torch.float64, None, 1)))
