# SPDX-License-Identifier: Apache-2.0
"""Operations that look up, choose and scatter.

A dimension that is looked up by numbers from outside (a vocabulary) is frozen. One whose numbers
came out of the network itself (a router's choice of experts) is not: the numbers point to the
dimension they were chosen from, and the two are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from modewright.pruning.graph.atoms import Ids
from modewright.pruning.graph.rules.pointwise import tied_dims
from modewright.pruning.graph.tracer import Op, Rule, Tracer, Value, fixed, is_live


def looked_up(trace: Tracer, dim: Ids, index: torch.Tensor, op: Op) -> None:
    """Tie a dimension to the one that the numbers were chosen from, or freeze it."""
    points = trace.value(index).points
    if points is not None and len(points) == len(dim):
        trace.atoms.tie(dim, points, f"it is looked up in {op}")
    else:
        trace.atoms.freeze(dim, f"it is looked up by given numbers in {op}")


def embedding(trace: Tracer, op: Op) -> Sequence[Value]:
    """Rows of a table."""
    table, numbers = trace.value(op["weight"]), trace.value(op["indices"])
    looked_up(trace, table.dims[0], op["indices"], op)
    return [Value((*numbers.dims, table.dims[1]))]


def index(trace: Tracer, op: Op) -> Sequence[Value]:
    """Advanced indexing ``x[i, :, j]``."""
    value = trace.value(op["self"])
    return [Value(_indexed(trace, value, op["indices"], op, op.outputs[0]), value.weight)]


def _indexed(
    trace: Tracer, value: Value, indices: Sequence[Any], op: Op, result: torch.Tensor
) -> tuple[Ids, ...]:
    kept: list[Ids] = []
    taken: list[int] = []
    operands: list[tuple[Ids, ...]] = []
    axis = 0
    for entry in indices:
        if entry is None:
            kept.append(value.dims[axis])
            axis += 1
            continue
        mask = entry.dtype in (torch.bool, torch.uint8)
        for offset in range(entry.ndim if mask else 1):
            looked_up(trace, value.dims[axis + offset], entry, op)
            taken.append(axis + offset)
        operands.append((fixed(1),) if mask else trace.value(entry).dims)
        axis += entry.ndim if mask else 1
    kept += value.dims[axis:]
    ndim = max(len(dims) for dims in operands)
    chosen = tied_dims(trace, operands, ndim, str(op))
    together = taken == list(range(taken[0], taken[0] + len(taken)))
    place = taken[0] if together else 0
    dims = [*kept[:place], *chosen, *kept[place:]]
    return tuple(
        dim if len(dim) == size else fixed(size)
        for dim, size in zip(dims, result.shape, strict=True)
    )


def index_select(trace: Tracer, op: Op) -> Sequence[Value]:
    """Rows along one dimension."""
    value = trace.value(op["self"])
    axis = op["dim"] % len(value.dims)
    looked_up(trace, value.dims[axis], op["index"], op)
    chosen = trace.value(op["index"]).dims[0] if op["index"].ndim else fixed(1)
    dims = (*value.dims[:axis], chosen, *value.dims[axis + 1 :])
    return [replace(value, dims=dims)]


def gather(trace: Tracer, op: Op) -> Sequence[Value]:
    """One element along a dimension for every number."""
    value, numbers = trace.value(op["self"]), trace.value(op["index"])
    axis = op["dim"] % len(value.dims)
    looked_up(trace, value.dims[axis], op["index"], op)
    _tie_others(trace, value, numbers, axis, op)
    return [Value(numbers.dims)]


def scatter(trace: Tracer, op: Op) -> Sequence[Value]:
    """``scatter``, ``scatter_add``: elements are put where the numbers say."""
    value, numbers = trace.value(op["self"]), trace.value(op["index"])
    axis = op["dim"] % len(value.dims)
    looked_up(trace, value.dims[axis], op["index"], op)
    _tie_others(trace, value, numbers, axis, op)
    source = op.arguments.get("src")
    if source is not None:
        _tie_others(trace, value, trace.value(source), axis, op)
    return [Value(value.dims)]


def index_add(trace: Tracer, op: Op) -> Sequence[Value]:
    """``index_add``, ``index_copy``: rows are put where the numbers say."""
    value, source = trace.value(op["self"]), trace.value(op["source"])
    axis = op["dim"] % len(value.dims)
    looked_up(trace, value.dims[axis], op["index"], op)
    _tie_others(trace, value, source, axis, op)
    return [Value(value.dims)]


def _tie_others(trace: Tracer, value: Value, other: Value, axis: int, op: Op) -> None:
    for place, (dim, met) in enumerate(zip(value.dims, other.dims, strict=True)):
        if place == axis:
            continue
        if len(dim) == len(met):
            trace.atoms.tie(dim, met, f"it meets a fixed dimension in {op}")
        else:
            trace.atoms.freeze(dim, f"only a part of it is used in {op}")


def index_put(trace: Tracer, op: Op) -> Sequence[Value]:
    """``x[i] = y``."""
    value, source = trace.value(op["self"]), trace.value(op["values"])
    if any(entry is not None and entry.dtype is torch.bool for entry in op["indices"]):
        return _only_fixed(trace, op)
    like = op["self"][tuple(slice(None) if e is None else e for e in op["indices"])]
    dims = _indexed(trace, value, op["indices"], op, like)
    tied_dims(trace, [dims, source.dims], len(dims), str(op))
    return [Value(value.dims)]


def _only_fixed(trace: Tracer, op: Op) -> Sequence[Value]:
    for tensor in op.tensors:
        trace.freeze(tensor, f"{op} writes by a mask")
    return [Value(tuple(fixed(size) for size in t.shape)) for t in op.outputs]


def topk(trace: Tracer, op: Op) -> Sequence[Value]:
    """The largest along a dimension, and which they are."""
    value = trace.value(op["self"])
    axis = op["dim"] % len(value.dims)
    dim = value.dims[axis]
    trace.atoms.mark("experts", dim)
    trace.atoms.mark("mixed", dim)
    if is_live(dim):
        first = int(dim[dim > 0][0])
        trace.minimum[first] = max(int(op["k"]), trace.minimum.get(first, 1))
    dims = (*value.dims[:axis], fixed(int(op["k"])), *value.dims[axis + 1 :])
    return [Value(dims), Value(dims, points=dim if is_live(dim) else None)]


def sort(trace: Tracer, op: Op) -> Sequence[Value]:
    """``sort``: the order is lost; numbers that point still point where they did."""
    value = trace.value(op["self"])
    if value.dims:
        trace.atoms.freeze(value.dims[op["dim"]], f"it is sorted in {op}")
    dims = tuple(
        fixed(len(dim)) if axis == op["dim"] % len(value.dims) else dim
        for axis, dim in enumerate(value.dims)
    )
    return [Value(dims, points=value.points), Value(dims)]


def histogram(trace: Tracer, op: Op) -> Sequence[Value]:
    """``histc``, ``bincount`` of numbers that point: how often each was chosen."""
    points = trace.value(op.tensors[0]).points
    if points is None or len(points) != op.outputs[0].numel():
        return _only_fixed(trace, op)
    return [Value((points,))]


def nonzero(trace: Tracer, op: Op) -> Sequence[Value]:
    """Which elements are not zero: numbers that point, if only one dimension can be cut."""
    value = trace.value(op["self"])
    live = [dim for dim in value.dims if is_live(dim)]
    points = live[0] if len(live) == 1 and len(value.dims) == 1 else None
    if points is None:
        for dim in live:
            trace.atoms.freeze(dim, f"its indices are numbered in {op}")
    return [Value(tuple(fixed(size) for size in op.outputs[0].shape), points=points)]


_TABLE: dict[Rule, tuple[str, ...]] = {
    embedding: ("embedding",),
    index: ("index", "_unsafe_index"),
    index_select: ("index_select",),
    gather: ("gather",),
    scatter: ("scatter", "scatter_", "scatter_add", "scatter_add_"),
    index_add: ("index_add", "index_add_", "index_copy", "index_copy_"),
    index_put: ("index_put", "index_put_", "_index_put_impl_"),
    topk: ("topk",),
    sort: ("sort",),
    histogram: ("histc", "bincount"),
    nonzero: ("nonzero",),
}
RULES: dict[str, Rule] = {f"aten.{name}": rule for rule, names in _TABLE.items() for name in names}
