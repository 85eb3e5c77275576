# SPDX-License-Identifier: Apache-2.0
"""Convolution, pooling and resampling."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from modewright.pruning.graph.rules.contraction import contract
from modewright.pruning.graph.rules.reduction import tie_places
from modewright.pruning.graph.tracer import Op, Rule, Tracer, Value, fixed


def convolution(trace: Tracer, op: Op) -> Sequence[Value]:
    """Convolutions, transposed and grouped ones among them.

    Depthwise, a channel goes with its filters. With other groups, all groups lose the same places,
    so that they stay equally wide.
    """
    x, w = trace.value(op["input"]), trace.value(op["weight"])
    groups, transposed = int(op["groups"]), bool(op["transposed"])
    channels = x.dims[-len(op.outputs[0].shape[1:])]
    made, taken = (w.dims[1], w.dims[0]) if transposed else (w.dims[0], w.dims[1])
    where = str(op)
    if groups == 1:
        contract(trace, (x, channels), (w, taken), where)
        outputs = made
    elif transposed:
        for dim in (channels, *w.dims):
            trace.atoms.freeze(dim, f"a transposed convolution in groups has no rule ({where})")
        outputs = fixed(op.outputs[0].shape[1])
    elif len(taken) == 1 and groups == len(channels):
        repeated = np.repeat(channels, len(made) // groups)
        trace.atoms.tie(made, repeated, f"its input is fixed in {where}")
        outputs = made
    else:
        tie_places(trace, channels, groups, where)
        tie_places(trace, made, groups, where)
        first = np.ascontiguousarray(channels.reshape(groups, -1)[0])
        contract(trace, (x, first), (w, taken), where)
        outputs = made
    if op["bias"] is not None:
        trace.atoms.tie(outputs, trace.value(op["bias"]).dims[0], f"in {where}")
    for dim in w.dims[2:]:
        trace.atoms.freeze(dim, "it is the size of a filter")
    return [_moved(op, x, outputs)]


def _moved(op: Op, x: Value, channels: np.ndarray) -> Value:
    """Return the output: batch of the input, new channels, places that cannot be cut."""
    shape = op.outputs[0].shape
    spatial = len(op["stride"])
    batch = x.dims[: len(shape) - spatial - 1]
    return Value((*batch, channels, *(fixed(size) for size in shape[-spatial:])))


def by_channel(trace: Tracer, op: Op) -> Sequence[Value]:
    """Pooling and resampling: every channel by itself."""
    value = trace.value(op.tensors[0])
    found = re.search(r"([123])d", op.name)
    spatial = int(found.group(1)) if found else len(value.dims) - 2
    for dim in value.dims[-spatial:]:
        trace.atoms.freeze(dim, f"places are pooled or resampled in {op}")
    kept = value.dims[: len(value.dims) - spatial]
    return [Value((*kept, *(fixed(size) for size in t.shape[-spatial:]))) for t in op.outputs]


_POOLS = [
    name.format(d=d)
    for d in (1, 2, 3)
    for name in (
        *("avg_pool{d}d", "max_pool{d}d", "max_pool{d}d_with_indices", "adaptive_avg_pool{d}d"),
        *("_adaptive_avg_pool{d}d", "adaptive_max_pool{d}d", "reflection_pad{d}d"),
        *("replication_pad{d}d", "upsample_nearest{d}d", "_upsample_nearest_exact{d}d"),
    )
]
_RESAMPLE = ("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d")
RULES: dict[str, Rule] = {
    **{f"aten.{name}": by_channel for name in (*_POOLS, *_RESAMPLE)},
    "aten.convolution": convolution,
}
