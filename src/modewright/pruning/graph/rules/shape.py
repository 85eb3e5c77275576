# SPDX-License-Identifier: Apache-2.0
"""Operations that move dimensions about: views, permutations, slices, concatenations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from modewright.pruning.graph.atoms import FIXED, Ids
from modewright.pruning.graph.rules.pointwise import tied_dims
from modewright.pruning.graph.tracer import Op, Rule, Tracer, Value, fixed, is_live, size_of


def permute(trace: Tracer, op: Op) -> Sequence[Value]:
    """``t``, ``transpose``, ``permute``."""
    value = trace.value(op["self"])
    order = list(range(len(value.dims)))
    if "dims" in op.arguments:
        order = [axis % len(order) for axis in op["dims"]]
    elif "dim0" in op.arguments:
        first, second = op["dim0"], op["dim1"]
        order[first], order[second] = order[second], order[first]
    else:
        order.reverse()
    return [replace(value, dims=tuple(value.dims[axis] for axis in order))]


def insert(trace: Tracer, op: Op) -> Sequence[Value]:
    """``unsqueeze``."""
    value = trace.value(op["self"])
    place = op["dim"] % (len(value.dims) + 1)
    return [replace(value, dims=(*value.dims[:place], fixed(1), *value.dims[place:]))]


def squeeze(trace: Tracer, op: Op) -> Sequence[Value]:
    """Drop dimensions of size 1: all, or those that are named."""
    value = trace.value(op["self"])
    asked = op.arguments.get("dim")
    asked = range(len(value.dims)) if asked is None else asked
    asked = [asked] if isinstance(asked, int) else asked
    gone = {axis % len(value.dims) for axis in asked if len(value.dims[axis]) == 1}
    return [replace(value, dims=tuple(d for i, d in enumerate(value.dims) if i not in gone))]


def expand(trace: Tracer, op: Op) -> Sequence[Value]:
    """Repeat dimensions of size 1; what is new cannot be cut."""
    value, shape = trace.value(op["self"]), op.outputs[0].shape
    old = (*[fixed(1)] * (len(shape) - len(value.dims)), *value.dims)
    dims = tuple(
        dim if len(dim) == size else fixed(size) for dim, size in zip(old, shape, strict=True)
    )
    return [replace(value, dims=dims)]


def repeat(trace: Tracer, op: Op) -> Sequence[Value]:
    """Put copies side by side."""
    value, times = trace.value(op["self"]), op["repeats"]
    old = (*[fixed(1)] * (len(times) - len(value.dims)), *value.dims)
    dims = tuple(np.tile(dim, count) for dim, count in zip(old, times, strict=True))
    return [replace(value, dims=dims)]


def cut(trace: Tracer, op: Op) -> Sequence[Value]:
    """``slice``: the atoms of what is left."""
    value = trace.value(op["self"])
    axis = op["dim"] % len(value.dims)
    dim = value.dims[axis][op["start"] : op["end"] : op["step"]]
    if len(dim) == len(value.dims[axis]):
        dim = value.dims[axis]
    return [replace(value, dims=(*value.dims[:axis], dim, *value.dims[axis + 1 :]))]


def split(trace: Tracer, op: Op) -> Sequence[Value]:
    """``split``, ``split_with_sizes``, ``chunk``: parts one after the other."""
    value = trace.value(op["self"])
    axis, start, found = op["dim"] % len(value.dims), 0, []
    for output in op.outputs:
        part = value.dims[axis][start : start + output.shape[axis]]
        start += output.shape[axis]
        found.append(replace(value, dims=(*value.dims[:axis], part, *value.dims[axis + 1 :])))
    return found


def select(trace: Tracer, op: Op) -> Sequence[Value]:
    """``select``, ``unbind``: picking one index by its number holds it where it is.

    A loop over a list of modules that goes along with the dimension is no such case: the list
    is cut as well.
    """
    value = trace.value(op["self"])
    axis = op["dim"] % len(value.dims)
    dim = value.dims[axis]
    if is_live(dim):
        path = _list_as_long(trace, len(dim))
        if path is None:
            trace.atoms.freeze(dim, f"{op} picks one index by its number")
        else:
            trace.lists.setdefault(path, dim)
            trace.atoms.tie(trace.lists[path], dim, "")
    rest = (*value.dims[:axis], *value.dims[axis + 1 :])
    return [replace(value, dims=rest) for _ in op.outputs]


def _list_as_long(trace: Tracer, size: int) -> str | None:
    for name, child in trace.module.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == size:
            return f"{trace.scope}.{name}" if trace.scope else name
    return None


def concatenate(trace: Tracer, op: Op) -> Sequence[Value]:
    """Put dimensions one after the other; the other dimensions are one."""
    tensors = [tensor for tensor in op["tensors"] if tensor.ndim == op.outputs[0].ndim]
    values = [trace.value(tensor) for tensor in tensors]
    axis = op["dim"] % op.outputs[0].ndim
    joined = np.concatenate([value.dims[axis] for value in values])
    others = [(*v.dims[:axis], fixed(1), *v.dims[axis + 1 :]) for v in values]
    dims = tied_dims(trace, others, op.outputs[0].ndim, str(op))
    weight = all(value.weight for value in values)
    return [Value((*dims[:axis], joined, *dims[axis + 1 :]), weight)]


def stack(trace: Tracer, op: Op) -> Sequence[Value]:
    """Put tensors side by side along a new dimension, which cannot be cut."""
    values = [trace.value(tensor) for tensor in op["tensors"]]
    axis = op["dim"] % op.outputs[0].ndim
    dims = tied_dims(trace, [v.dims for v in values], op.outputs[0].ndim - 1, str(op))
    weight = all(value.weight for value in values)
    return [Value((*dims[:axis], fixed(len(values)), *dims[axis:]), weight)]


def flip(trace: Tracer, op: Op) -> Sequence[Value]:
    """Turn dimensions around."""
    value = trace.value(op["self"])
    turned = {axis % len(value.dims) for axis in op["dims"]}
    dims = tuple(dim[::-1].copy() if i in turned else dim for i, dim in enumerate(value.dims))
    return [replace(value, dims=dims)]


def pad(trace: Tracer, op: Op) -> Sequence[Value]:
    """``constant_pad_nd``: what is put on is fixed, and so is what it is put on."""
    value, widths = trace.value(op["self"]), op["pad"]
    dims = list(value.dims)
    for back in range(len(widths) // 2):
        axis = len(dims) - 1 - back
        before, after = widths[2 * back], widths[2 * back + 1]
        if before or after:
            trace.atoms.freeze(dims[axis], f"it is padded in {op}")
            dims[axis] = fixed(op.outputs[0].shape[axis])
    return [replace(value, dims=tuple(dims))]


def reshape(trace: Tracer, op: Op) -> Sequence[Value]:
    """Factor and merge dimensions.

    Where one dimension becomes several, one of these holds the units: with ``[heads * size]`` as
    ``[heads, size]`` a head is one. Which one is tried from the outermost on.
    """
    value, shape = trace.value(op["self"]), tuple(op.outputs[0].shape)
    if size_of(value.dims) == 0:
        return [Value(tuple(fixed(size) for size in shape))]
    dims: list[Ids] = []
    for old, new in _blocks(tuple(len(dim) for dim in value.dims), shape):
        dims += _regrouped(trace, [value.dims[i] for i in old], [shape[i] for i in new], str(op))
    return [replace(value, dims=tuple(dims))]


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest runs of old and new dimensions that hold equally many elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = ([i], [j]) if i < len(old) and j < len(new) else ([], [])
        if not left:
            left, right = list(range(i, len(old))), list(range(j, len(new)))  # ones at the end
            yield left, right
            return
        product_old, product_new = old[i], new[j]
        i, j = i + 1, j + 1
        while product_old != product_new:
            if product_old < product_new:
                product_old *= old[i]
                left.append(i)
                i += 1
            else:
                product_new *= new[j]
                right.append(j)
                j += 1
        yield left, right


def _regrouped(trace: Tracer, old: list[Ids], sizes: list[int], where: str) -> list[Ids]:
    if len(old) == 1 and len(sizes) == 1:
        return old
    live = [dim for dim in old if is_live(dim)]
    if not live:
        return [fixed(size) for size in sizes]
    for other in live[1:]:
        trace.atoms.freeze(other, f"it is merged with another dimension in {where}")
    kept = next(i for i, dim in enumerate(old) if dim is live[0])
    inner = size_of(old[kept + 1 :])
    outer = size_of(old[:kept])
    elements = np.tile(np.repeat(live[0], inner), outer).reshape(sizes)
    wide = [axis for axis, size in enumerate(sizes) if size > 1]
    if len(wide) == 1:
        return [elements.reshape(-1) if axis == wide[0] else fixed(1) for axis in range(len(sizes))]
    unit = _unit_axis(trace, elements, wide)
    rows = np.moveaxis(elements, unit, 0).reshape(sizes[unit], -1)
    heads = np.ascontiguousarray(rows[:, 0])
    for column in range(1, rows.shape[1]):
        if not np.array_equal(rows[:, column], heads):
            trace.atoms.tie(heads, np.ascontiguousarray(rows[:, column]), f"in {where}")
    return [heads if axis == unit else fixed(size) for axis, size in enumerate(sizes)]


def _unit_axis(trace: Tracer, elements: Ids, wide: list[int]) -> int:
    """Return the axis that holds the units: one that fits as it is, or the chosen candidate."""
    for axis in wide:
        rows = np.moveaxis(elements, axis, 0).reshape(elements.shape[axis], -1)
        if np.all(rows == rows[:, :1]):
            return axis
    number = trace.split_count
    trace.split_count += 1
    trace.splits[number] = (elements[elements != FIXED], len(wide))
    return wide[min(trace.choices.get(number, 0), len(wide) - 1)]


_TABLE: dict[Rule, tuple[str, ...]] = {
    permute: ("t", "transpose", "permute", "transpose_", "t_"),
    insert: ("unsqueeze", "unsqueeze_"),
    squeeze: ("squeeze", "squeeze_"),
    expand: ("expand",),
    repeat: ("repeat",),
    cut: ("slice",),
    split: ("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"),
    select: ("select", "unbind"),
    concatenate: ("cat",),
    stack: ("stack",),
    flip: ("flip",),
    pad: ("constant_pad_nd",),
    reshape: ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten"),
}
RULES: dict[str, Rule] = {f"aten.{name}": rule for rule, names in _TABLE.items() for name in names}
