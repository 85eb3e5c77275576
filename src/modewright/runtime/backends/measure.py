# SPDX-License-Identifier: Apache-2.0
"""Which backend is the fastest: timed on a weight of random numbers, each kind of weight once."""

from __future__ import annotations

import time
from functools import cache
from statistics import median
from typing import Any

import torch

from modewright.runtime.activations import FP8_TENSOR, INT8_TENSOR
from modewright.runtime.backends.base import MORE_ROWS, Backend, Case
from modewright.runtime.packed_weight import PackedWeight

_ROUNDS = 5
_MANY_ROWS = 4 * MORE_ROWS


@cache
def fastest(case: Case, candidates: tuple[Backend, ...]) -> Backend:
    """Return the candidate that takes the least time; they are timed in turns."""
    weight = random_weight(case)
    rows = min(case.rows, _MANY_ROWS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, case.spec.shape[1], generator=generator)
    x = x.to(case.device, case.dtype)
    given = case.act in (INT8_TENSOR, FP8_TENSOR)
    scale = torch.full((1, 1), 0.05, device=case.device) if given else None
    prepared = [backend.prepare(weight) for backend in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    for turn in range(_ROUNDS + 1):
        for backend, ready, taken in zip(candidates, prepared, times, strict=True):
            seconds = _timed(backend, x, ready, case.act, scale)
            if turn:  # the first one warms up
                taken.append(seconds)
    medians = [median(taken) for taken in times]
    return candidates[medians.index(min(medians))]


def random_weight(case: Case) -> PackedWeight:
    """Return a weight with random codes; all its scales are powers of two."""
    weight = PackedWeight.allocate(case.spec, case.device)
    weight.packed.random_(0, 256)
    if weight.zero_point is not None:
        weight.zero_point.random_(0, 256)
    weight.scale.copy_(
        torch.full_like(weight.scale, 120 if case.spec.scale_format == "e8m0" else 1)
    )
    if weight.global_scale is not None:
        weight.global_scale.fill_(0.01)
    return weight


def _timed(
    backend: Backend, x: torch.Tensor, prepared: Any, act: str | None, scale: torch.Tensor | None
) -> float:
    started = time.perf_counter()
    backend.linear(x, prepared, None, act, scale)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - started
