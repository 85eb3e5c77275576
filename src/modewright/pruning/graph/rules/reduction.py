# SPDX-License-Identifier: Apache-2.0
"""Operations that mix the indices of a dimension: sums, softmax, norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modewright.pruning.graph.atoms import Ids
from modewright.pruning.graph.tracer import Op, Rule, Tracer, Value, fixed, is_live

MIXED = "mixed"


def reduce(trace: Tracer, op: Op) -> Sequence[Value]:
    """Sums, means, maxima and so on over named dimensions, or over all."""
    value = trace.value(op.tensors[0])
    axes = _axes(op, len(value.dims))
    for axis in axes:
        trace.atoms.mark(MIXED, value.dims[axis])
    keep = bool(op.arguments.get("keepdim", False))
    dims = tuple(
        fixed(1) if axis in axes else dim
        for axis, dim in enumerate(value.dims)
        if keep or axis not in axes
    )
    found = [Value(dims) for _ in op.outputs]
    picked = [value.dims[axis] for axis in axes if is_live(value.dims[axis])]
    if len(picked) == 1 and (len(found) == 2 or "arg" in op.name):
        found[-1] = Value(dims, points=picked[0])  # max with its place, argmax
    return found


def _axes(op: Op, ndim: int) -> set[int]:
    named = op.arguments.get("dim")
    if named is None or (isinstance(named, (list, tuple)) and not named):
        return set(range(ndim))
    named = [named] if isinstance(named, int) else named
    return {axis % ndim for axis in named} if ndim else set()


def along(trace: Tracer, op: Op) -> Sequence[Value]:
    """``softmax``, ``cumsum``: indices along a dimension are mixed, and stay."""
    value = trace.value(op["self"])
    if value.dims:
        trace.atoms.mark(MIXED, value.dims[op["dim"]])
    return [Value(value.dims) for _ in op.outputs]


def layer_norm(trace: Tracer, op: Op) -> Sequence[Value]:
    """Norms over the last dimensions, with a scale and a shift of these dimensions."""
    value = trace.value(op["input"])
    count = len(op["normalized_shape"])
    for name in ("weight", "bias"):
        tensor = op.arguments.get(name)
        if tensor is not None:
            _tie_all(trace, value.dims[-count:], trace.value(tensor).dims, op)
    for dim in value.dims[-count:]:
        trace.atoms.mark(MIXED, dim)
        trace.atoms.mark("normed", dim)
    return [Value(value.dims), *_statistics(op.outputs[1:])]


def batch_norm(trace: Tracer, op: Op) -> Sequence[Value]:
    """Norms of each channel by itself."""
    value = trace.value(op["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = op.arguments.get(name)
        if tensor is not None:
            _tie_all(trace, value.dims[1:2], trace.value(tensor).dims, op)
    return [Value(value.dims), *_statistics(op.outputs[1:])]


def group_norm(trace: Tracer, op: Op) -> Sequence[Value]:
    """Norms over groups of channels: the same places of all groups go together."""
    value, groups = trace.value(op["input"]), int(op["group"])
    channels = value.dims[1]
    for name in ("weight", "bias"):
        tensor = op.arguments.get(name)
        if tensor is not None:
            _tie_all(trace, (channels,), trace.value(tensor).dims, op)
    trace.atoms.mark(MIXED, channels)
    if groups not in (1, len(channels)):
        tie_places(trace, channels, groups, str(op))
    return [Value(value.dims), *_statistics(op.outputs[1:])]


def tie_places(trace: Tracer, dim: Ids, groups: int, where: str) -> None:
    """Tie the first index of every group, the second of every group, and so on."""
    rows = dim.reshape(groups, -1)
    for row in rows[1:]:
        trace.atoms.tie(
            np.ascontiguousarray(rows[0]), np.ascontiguousarray(row), f"grouped in {where}"
        )


def _tie_all(trace: Tracer, dims: Sequence[Ids], others: Sequence[Ids], op: Op) -> None:
    for dim, other in zip(dims, others, strict=True):
        trace.atoms.tie(dim, other, f"it meets a fixed dimension in {op}")


def _statistics(outputs: Sequence[Any]) -> list[Value]:
    return [Value(tuple(fixed(size) for size in tensor.shape)) for tensor in outputs]


_REDUCE = (
    *("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "std_mean"),
    *("any", "all", "logsumexp", "linalg_vector_norm", "norm", "argmax", "argmin", "count_nonzero"),
)
_BATCH = (
    *("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"),
    *("_native_batch_norm_legit_no_training", "_batch_norm_with_update", "batch_norm"),
    *("_batch_norm_no_update", "_batch_norm_with_update_functional"),
)
RULES: dict[str, Rule] = {
    **{f"aten.{name}": reduce for name in _REDUCE},
    **{f"aten.{name}": along for name in ("_softmax", "_log_softmax", "softmax", "cumsum")},
    **{f"aten.{name}": batch_norm for name in _BATCH},
    **{f"aten.{name}": layer_norm for name in ("native_layer_norm", "_fused_rms_norm", "rms_norm")},
    "aten.native_group_norm": group_norm,
}
