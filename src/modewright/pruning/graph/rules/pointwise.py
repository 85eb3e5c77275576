# SPDX-License-Identifier: Apache-2.0
"""Operations element by element: dimensions that meet are one."""

from __future__ import annotations

from collections.abc import Sequence

from modewright.pruning.graph.atoms import Ids
from modewright.pruning.graph.tracer import Op, Rule, Tracer, Value, is_live


def broadcast(trace: Tracer, op: Op) -> Sequence[Value]:
    """Tie the dimensions of all inputs as broadcasting lines them up."""
    inputs = [trace.value(tensor) for tensor in op.tensors]
    dims = tied_dims(trace, [value.dims for value in inputs], op.outputs[0].ndim, str(op))
    weight = all(value.weight for value in inputs)
    return [Value(dims, weight) for _ in op.outputs]


def tied_dims(
    trace: Tracer, operands: Sequence[tuple[Ids, ...]], ndim: int, where: str
) -> tuple[Ids, ...]:
    """Return the broadcast dimensions of operands, tied where they meet."""
    result = []
    for back in range(ndim, 0, -1):
        meeting = [dims[-back] for dims in operands if len(dims) >= back]
        wide = [dim for dim in meeting if len(dim) > 1] or meeting
        chosen = next((dim for dim in wide if is_live(dim)), wide[0])
        for other in wide:
            if other is not chosen:
                trace.atoms.tie(chosen, other, f"it meets a fixed dimension in {where}")
        result.append(chosen)
    return tuple(result)


def same(trace: Tracer, op: Op) -> Sequence[Value]:
    """Keep everything: copies, casts, views of the whole."""
    return [trace.value(op.tensors[0]) for _ in op.outputs]


def shaped_alike(trace: Tracer, op: Op) -> Sequence[Value]:
    """Keep the dimensions, not the values: ``zeros_like``."""
    return [Value(trace.value(op.tensors[0]).dims) for _ in op.outputs]


def factory(trace: Tracer, op: Op) -> Sequence[Value]:
    """Give a constant tensor atoms of its own: it can have any size that it is asked for."""
    return [Value(tuple(trace.atoms.fresh(size) for size in t.shape)) for t in op.outputs]


_SAME = (
    *("detach", "alias", "clone", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy"),
    *("dropout", "relu_", "_conj", "resolve_conj", "view_as", "positive"),
)
_ALIKE = (
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("zero_", "fill_", "uniform_", "normal_", "bernoulli", "bernoulli_", "native_dropout"),
    "logical_not",
)
_FACTORY = (*("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"),)
_BROADCAST = ("copy_", "masked_fill", "masked_fill_", "where", "prelu", "_prelu_kernel")

RULES: dict[str, Rule] = {
    **{f"aten.{name}": same for name in _SAME},
    **{f"aten.{name}": shaped_alike for name in _ALIKE},
    **{f"aten.{name}": factory for name in _FACTORY},
    **{f"aten.{name}": broadcast for name in _BROADCAST},
}
