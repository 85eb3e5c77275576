# SPDX-License-Identifier: Apache-2.0
"""What this machine would use for which weights, and why not the others: data for a report."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from modewright.runtime.backends.base import Case, short
from modewright.runtime.backends.choice import choose
from modewright.runtime.backends.table import backends
from modewright.runtime.native.library import library
from modewright.runtime.packed_spec import PackedSpec

_SHAPE = (2048, 2048)
_ROWS = (1, 64)
_E8M0 = {"scale_format": "e8m0", "scale_dtype": "uint8"}
_E4M3 = {"scale_format": "e4m3", "scale_dtype": "float8_e4m3fn"}
_WEIGHTS: tuple[tuple[str, dict[str, Any], str | None], ...] = (
    ("int8", {}, None),
    ("int8", {}, "int8_token"),
    ("int8", {}, "int8_tensor"),
    ("int4", {"granularity": "group", "group_size": 64}, None),
    ("uint4", {"granularity": "group", "group_size": 64}, None),
    ("int4", {"granularity": "group", "group_size": 64}, "int8_token"),
    ("int3", {"granularity": "group", "group_size": 64}, None),
    ("uint2", {"granularity": "group", "group_size": 64}, None),
    ("fp4_e2m1", {"granularity": "group", "group_size": 16, **_E4M3}, None),
    ("fp4_e2m1", {"granularity": "group", "group_size": 32, **_E8M0}, None),
    ("fp6_e2m3", {"granularity": "group", "group_size": 32, **_E8M0}, None),
    ("fp8_e4m3", {"granularity": "group", "group_size": 32, **_E8M0}, None),
    ("fp8_e4m3", {}, None),
    ("fp8_e4m3", {"granularity": "block", "block_size": (128, 128)}, None),
    ("nf4", {"granularity": "group", "group_size": 64}, None),
)


@dataclass(frozen=True)
class Row:
    """One kind of weight: what serves it, and why those do not that come before.

    Attributes:
        weight: What it is, in short.
        activations: How the scheme quantizes them.
        rows: Rows of activations.
        backend: What serves it.
        refusals: Why the backends that are preferred to it do not, by name.
    """

    weight: str
    activations: str
    rows: int
    backend: str
    refusals: dict[str, str]


@dataclass(frozen=True)
class Survey:
    """What this machine is, which backends there are, and what they serve."""

    machine: dict[str, str]
    backends: tuple[dict[str, Any], ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return asdict(self)


def survey(
    device: str = "cpu", dtype: torch.dtype = torch.float32, *, measure: bool = False
) -> Survey:
    """Return what would be used for the usual kinds of weights.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: Of the activations.
        measure: Choose by timing.
    """
    rows = [
        _row(PackedSpec(name, _SHAPE, **fields), act, count, device, dtype, measure)
        for name, fields, act in _WEIGHTS
        for count in _ROWS
    ]
    return Survey(_machine(device), tuple(_described()), tuple(rows))


def _row(
    spec: PackedSpec, act: str | None, rows: int, device: str, dtype: torch.dtype, measure: bool
) -> Row:
    case = Case(spec, device, dtype, act, rows)
    chosen = choose(case, measure=measure)
    refusals = {}
    for name, backend in backends().items():
        if backend is chosen:
            break
        refusals[name] = backend.refuses(case) or "it was slower"
    return Row(short(spec), act or "as they are", rows, chosen.name, refusals)


def _machine(device: str) -> dict[str, str]:
    found = library()
    native = found if isinstance(found, str) else f"built, uses {found.isas[-1]}"
    return {
        "processor": f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}",
        "device": device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "own kernel": native,
    }


def _described() -> list[dict[str, Any]]:
    return [
        {
            "name": backend.name,
            "summary": backend.summary,
            "needs": backend.needs,
            "accuracy": backend.accuracy,
            "copies": backend.copies,
        }
        for backend in backends().values()
    ]
